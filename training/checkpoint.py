"""A model on disk: `model.safetensors` (the numbers) and `model.json` (all else, written last). No pickle.

`model.safetensors` holds what SequenceModel.tensors() gives, among it `item_counts` int64 [items] (0: an item that the
model does not know) and the parts of the item vectors (training.model.ItemTable). `model.json` holds `spec`
(training.config.ModelSpec), `about` it: model_version, as_of, provenance, `training` (history and metrics), and the
weights' SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from jobs.errors import TrailvecError
from training.config import ModelSpec

if TYPE_CHECKING:  # torch and Transformers4Rec take seconds to import; reading the vectors needs neither
    from training.model import SequenceModel

WEIGHTS = "model.safetensors"
ABOUT = "model.json"


def save_model(folder: Path, model: SequenceModel, about: dict[str, Any]) -> None:
    """Writes both files into an existing folder. The caller renames the folder: until then nobody reads it."""
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(model.tensors(), folder / WEIGHTS)
    sha256 = _sha256(folder / WEIGHTS)
    # Not sorted: the order of the item attributes is that of their tables.
    text = json.dumps({**about, "spec": model.spec.model_dump(), "weights_sha256": sha256}, indent=2)
    part = folder / f".{ABOUT}.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / ABOUT)


def read_about(folder: Path) -> dict[str, Any]:
    """What model.json says, after a check that it belongs to the weights beside it.

    Raises:
        TrailvecError: a file is missing or damaged.
    """
    about = _read_json(folder / ABOUT)
    if not (folder / WEIGHTS).exists():
        raise _damaged(folder, f"{WEIGHTS} is missing")
    if _sha256(folder / WEIGHTS) != about["weights_sha256"]:
        raise _damaged(folder, f"{WEIGHTS} is not the file that {ABOUT} was written for")
    return about


class ItemVectors:
    """The item vectors of a model's weights, read in place: only what is asked for comes into memory."""

    def __init__(self, weights: Path) -> None:
        """Raises TrailvecError: the file is missing or damaged."""
        with _open(weights, "pt") as file:
            self._own = file.get_tensor("table.own.weight")
            self._counts = file.get_tensor("item_counts")
            count = file.get_tensor("table.attributes").shape[0]
            self._parts = [file.get_tensor(f"table.parts.{place}.weight") for place in range(count)]

    def of(
        self, items: npt.NDArray[np.int64], attributes: Sequence[npt.NDArray[np.int64]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The vectors of items, float32 [n, width], and which of them are cold, bool [n].

        Args:
            items: numbers from the vocabulary, [n]; one that the model does not know is cold.
            attributes: for each of spec.attribute_sizes [n]; a number that the model has not learnt says nothing.
                A cold item with nothing to say has a vector of zeros.
        """
        inside = items < len(self._own)
        place = np.where(inside, items, 0)
        cold = ~inside | (self._counts[place].numpy() == 0)
        vectors: npt.NDArray[np.float32] = self._own[place].numpy() * ~cold[:, None]
        for part, numbers in zip(self._parts, attributes, strict=True):
            vectors += part[np.where(numbers < len(part), numbers, 0)].numpy()  # row 0 is zero
        return vectors, cold


def load_model(weights: Path, spec: ModelSpec) -> SequenceModel:
    """The model, ready to encode.

    Raises:
        TrailvecError: the file is missing, damaged, or of another model.
    """
    from training.model import build_model  # noqa: PLC0415

    with _open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    try:
        model = build_model(spec, tensors["item_counts"], tensors["table.attributes"])
        model.load_tensors(tensors)
    except (KeyError, RuntimeError) as error:
        raise _damaged(weights.parent, f"{weights.name} does not fit its description: {error}") from None
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        ModelSpec.model_validate(about["spec"])
        return {**about, "weights_sha256": str(about["weights_sha256"])}
    except FileNotFoundError:
        raise _damaged(path.parent, f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, ValidationError):
        raise _damaged(path.parent, f"{path.name} is no description of a model") from None


def _open(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise _damaged(path.parent, f"{path.name} can't be read ({error})") from None


def _damaged(folder: Path, what: str) -> TrailvecError:
    return TrailvecError(f"the model in {folder} is damaged: {what}: remove the folder and run `trailvec train` again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
