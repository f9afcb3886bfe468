"""Models and checkpoints on disk: tensors as safetensors, all else as JSON (written last). No pickle.

A model is `model.safetensors` and `model.json`.

`model.safetensors` holds SequenceModel.tensors(), including `item_counts` int64 [items] (0: an item that the model does
not know) and the parts of the item vectors (training.model.ItemTable). `model.json` holds `spec`
(training.config.ModelSpec), model_version, as_of, provenance, `training` (history and metrics), and the weights'
SHA-256. `trailvec align` adds the alignment with the previous model's space: `alignment.json` and, if the published
vectors are rotated, `alignment.safetensors` with `rotation` float32 [width, width].

A checkpoint is a folder `<epoch>-<step>` with `state.safetensors` and `checkpoint.json` (`Progress`, and the SHA-256 of
the former). It is written under a temporary name, flushed to disk (on HDFS: copied from rank 0's disk) and renamed, so
a folder with a final name is complete. S3 cannot rename: there, a folder with a `checkpoint.json` is complete. The
tensors are `model.<name>` (as in a model), `optimizer.<parameter>.<key>`, `items.<key>` (training.rowwise), and
`rng.<rank>`, uint8: the state of torch's generator on that rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from jobs.errors import TrailvecError
from training.arrays import Bool, Float32, Int64
from training.config import ModelSpec
from training.stores import Folder, filled, flush, local_file, remove_tree, sha256_of, write_whole

if TYPE_CHECKING:  # torch and Transformers4Rec take seconds to import; reading the vectors needs neither
    import torch

    from training.model import SequenceModel

WEIGHTS = "model.safetensors"
ABOUT = "model.json"
STATE = "state.safetensors"
PROGRESS = "checkpoint.json"
ROTATION = "alignment.safetensors"
ALIGNMENT = "alignment.json"


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes SequenceModel.tensors(). They become a model only with `describe_weights`."""
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, folder / WEIGHTS)


def describe_weights(folder: Path, spec: ModelSpec, about: dict[str, Any]) -> None:
    """Writes model.json for the weights in the folder, which makes them a model."""
    sha256 = sha256_of(folder / WEIGHTS)
    # Keys unsorted: the order of the item attributes is that of their tables.
    text = json.dumps({**about, "spec": spec.model_dump(), "weights_sha256": sha256}, indent=2)
    write_whole(folder / ABOUT, text + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """The content of model.json. The weights, which may be gigabytes, are not read.

    Raises:
        TrailvecError: the file is missing or damaged.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        ModelSpec.model_validate(about["spec"])
        return {**about, "weights_sha256": str(about["weights_sha256"])}
    except FileNotFoundError:
        raise _damaged(folder, f"{ABOUT} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(folder, f"{ABOUT} is not a description of a model") from None


def read_about(folder: Path) -> dict[str, Any]:
    """The content of model.json, after checking that it belongs to the weights beside it.

    Raises:
        TrailvecError: a file is missing or damaged.
    """
    about = read_description(folder)
    if not (folder / WEIGHTS).exists():
        raise _damaged(folder, f"{WEIGHTS} is missing")
    if sha256_of(folder / WEIGHTS) != about["weights_sha256"]:
        raise _damaged(folder, f"{WEIGHTS} is not the file that {ABOUT} was written for")
    return about


def write_alignment(folder: Path, rotation: Float32 | None, report: dict[str, Any]) -> None:
    """Writes the rotation of a model's vectors (None: they stay as they are), then the report, which marks the model as
    aligned. If killed in between, the model is not aligned, whatever it was before."""
    (folder / ALIGNMENT).unlink(missing_ok=True)
    sha256 = None
    if rotation is not None:
        part = folder / f".{ROTATION}.part"
        save_file({"rotation": rotation}, part)
        sha256 = sha256_of(part)
        part.replace(folder / ROTATION)
    write_whole(folder / ALIGNMENT, json.dumps({**report, "rotation_sha256": sha256}, indent=2) + "\n")


def read_alignment(folder: Path) -> dict[str, Any] | None:
    """The content of alignment.json; None if the model has not been aligned.

    Raises:
        TrailvecError: the file is damaged.
    """
    try:
        report: dict[str, Any] = json.loads((folder / ALIGNMENT).read_text(encoding="utf-8"))
        return {**report, "rotation_sha256": report["rotation_sha256"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(folder, f"{ALIGNMENT} is not a report on a model's space") from None


def rotation_sha256(folder: Path) -> str | None:
    """The SHA-256 of the rotation of the model's vectors; None: no rotation.

    Raises:
        TrailvecError: alignment.json is damaged.
    """
    report = read_alignment(folder)
    return None if report is None else report["rotation_sha256"]


def read_rotation(folder: Path) -> Float32 | None:
    """The rotation of the model's vectors, float32 [width, width]; None: no rotation.

    Raises:
        TrailvecError: a file is missing or damaged.
    """
    sha256 = rotation_sha256(folder)
    if sha256 is None:
        return None
    path = folder / ROTATION
    if not path.exists() or sha256_of(path) != sha256:
        raise _damaged(folder, f"{ROTATION} is not the file that {ALIGNMENT} was written for")
    return np.asarray(load_file(path)["rotation"])


class ItemVectors:
    """The item vectors of a model's weights, memory-mapped: only the rows that are used come into memory."""

    def __init__(self, weights: Path) -> None:
        """Raises TrailvecError: the file is missing or damaged."""
        with _open(weights) as file:
            try:
                self._own = file.get_tensor("table.own.weight")
                self._counts = file.get_tensor("item_counts")
                self._attributes = file.get_tensor("table.attributes")
                places = range(len(self._attributes))
                self._parts = [file.get_tensor(f"table.parts.{place}.weight") for place in places]
            except SafetensorError as error:
                raise _damaged(weights.parent, f"{weights.name} holds no items ({error})") from None

    def of(self, items: Int64, attributes: Sequence[Int64]) -> tuple[Float32, Bool]:
        """The vectors of items, float32 [n, width], and which of them are cold, bool [n].

        Args:
            items: numbers from the vocabulary, [n]; an item that the model does not know is cold.
            attributes: for each of spec.attribute_sizes today's numbers, [n]; they count for cold items only. A known
                item keeps those that it was trained with: its own part was learnt beside theirs. A number that the
                model has not learnt adds nothing; a cold item without a learnt one gets zeros.
        """
        inside = items < len(self._own)
        place = np.where(inside, items, 0)
        cold = ~inside | (self._counts[place].numpy() == 0)
        vectors: Float32 = self._own[place].float().numpy() * ~cold[:, None]
        for part, trained, today in zip(self._parts, self._attributes, attributes, strict=True):
            numbers = np.where(cold, today, trained[place].numpy())
            vectors += part[np.where(numbers < len(part), numbers, 0)].numpy()  # row 0 is zero
        return vectors, cold


def load_model(weights: Path, spec: ModelSpec) -> SequenceModel:
    """The model, for inference only. Its tensors are memory-mapped: what is used comes into memory, once for all
    processes of a machine.

    Raises:
        TrailvecError: the file is missing, damaged, or of another model.
    """
    from training.model import build_model  # noqa: PLC0415

    tensors = read_tensors(weights)
    try:
        own = tensors["table.own.weight"]
        model = build_model(spec, tensors["item_counts"], tensors["table.attributes"], own)
        model.load_state_dict(tensors, assign=True)
    except (KeyError, RuntimeError) as error:
        raise _damaged(weights.parent, f"{weights.name} does not fit its description: {error}") from None
    return model.eval()


def read_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """The tensors that SequenceModel.tensors() returned.

    Raises:
        TrailvecError: the file is missing or damaged.
    """
    with _open(weights) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


class Progress(BaseModel):
    """A run's progress: all of its state that is not a tensor. Sums are of training.loop.SUMS."""

    ranks: int
    epoch: int = 1  # the current one
    step: int = 0  # completed steps of this epoch
    rows_sha256: str = ""  # training.data.rows_digest of the files that the run reads
    rows_done: float = 0.0  # of all epochs and ranks
    sums: list[float] = []  # of this epoch, over all ranks
    rank_sums: list[list[float]] = []  # the same, per rank
    curve: list[list[float]] = []  # of all epochs: [rows_done, mean loss since the previous entry]
    curve_sums: list[float] = []  # `sums` at the last entry
    history: list[dict[str, Any]] = []  # an entry per completed epoch
    best: float = -1.0
    best_epoch: int = 0
    best_sha256: list[str] = []  # of the best epoch's parameters, per rank


def write_checkpoint(folder: Folder, progress: Progress, tensors: dict[str, torch.Tensor], keep: int) -> None:
    """Adds a checkpoint to the folder, then removes all but the `keep` newest and the ones from the end of their best
    epochs."""
    from safetensors.torch import save_file  # noqa: PLC0415

    with filled(folder / _name(progress.epoch, progress.step)) as local:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, local / STATE)
        text = json.dumps({"progress": progress.model_dump(), "state_sha256": sha256_of(local / STATE)}, indent=1)
        (local / PROGRESS).write_text(text + "\n", encoding="utf-8")
        for path in (local / STATE, local / PROGRESS):
            flush(path)
    complete = checkpoints(folder)
    newest = complete[-keep:]
    kept = {path.name for path in newest} | {best_checkpoint(folder, progress).name}
    # If a newer one turns out damaged, the run resumes from an earlier one, which may name another best epoch.
    kept |= {best_checkpoint(folder, of).name for path in newest if (of := _progress_or_none(path))}
    for old in complete:
        if old.name not in kept:
            remove_tree(old)


def checkpoints(folder: Folder) -> list[Folder]:
    """The complete checkpoints, oldest first."""
    candidates = [path for path in folder.glob("[0-9]*-[0-9]*") if re.fullmatch(r"\d+-\d+", path.name)]
    complete = [path for path in candidates if (path / PROGRESS).exists()]
    return sorted(complete, key=lambda path: tuple(map(int, path.name.split("-"))))


def newest_checkpoint(folder: Folder) -> Folder | None:
    """The checkpoint to resume from; None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def read_checkpoint(path: Folder) -> tuple[Progress, dict[str, torch.Tensor]]:
    """The progress and tensors that `write_checkpoint` was given.

    Raises:
        TrailvecError: the checkpoint is damaged.
        OSError: it could not be read, which says nothing about it: a full disk, a store that does not answer.
    """
    from safetensors.torch import load_file  # noqa: PLC0415

    progress, state_sha256 = read_progress(path)
    try:
        with local_file(path / STATE) as state:
            if sha256_of(state) != state_sha256:
                raise ValueError(f"{STATE} is not the file that {PROGRESS} was written for")
            return progress, load_file(state)
    except (FileNotFoundError, ValueError, SafetensorError) as error:
        raise _damaged_checkpoint(path, error) from None


def read_progress(path: Folder) -> tuple[Progress, str]:
    """The checkpoint's progress, and the SHA-256 of its tensor file, which is not read.

    Raises:
        TrailvecError: `checkpoint.json` is missing or damaged.
        OSError: it could not be read.
    """
    try:
        about = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        return Progress.model_validate(about["progress"]), str(about["state_sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_checkpoint(path, error) from None


def best_checkpoint(folder: Folder, progress: Progress) -> Folder:
    """The checkpoint from the end of the best epoch so far."""
    return folder / _name(progress.best_epoch + 1, 0)


def _progress_or_none(path: Folder) -> Progress | None:
    try:
        return read_progress(path)[0]
    except TrailvecError:  # reported when a run tries to resume from it
        return None


def optimizer_tensors(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """The optimizer's state: tensors by `<parameter>.<key>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(model: torch.nn.Module, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Loads the result of `optimizer_tensors`."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        by_name.setdefault(name, {})[key] = tensor.clone()  # so that the file can be released
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: by_name[name] for number, name in enumerate(order) if name in by_name}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with the prefix, keyed without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _name(epoch: int, step: int) -> str:
    return f"{epoch:05}-{step:010}"


def _open(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors calls a file missing whatever keeps it from opening it
        return safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise _damaged(path.parent, f"{path.name} can't be read ({error})") from None


def _damaged(folder: Path, what: str) -> TrailvecError:
    return TrailvecError(f"the model in {folder} is damaged: {what}: remove the folder and run `trailvec train` again")


def _damaged_checkpoint(path: Folder, error: Exception) -> TrailvecError:
    why = str(error).splitlines()[0]
    return TrailvecError(
        f"the checkpoint {path} is damaged ({why}): remove that folder, and training resumes from the one before it"
    )
