"""The profile: a second vector of a user, for other teams' models. The one in the items' space stays as it is.

A profile is PARTS side by side. Each is centred and brought to one length over the users that the basis was fitted on,
so that a part weighs what WEIGHTS says, however many places it has:

  state       the model's state after the user's last action: what comes next, and in which order things came
  items       TF-IDF of the user's items, in its first singular directions: which ones, over the whole history
  categories  the same of their categories
  tastes      the items' vectors in the model, summed by the TF-IDF of the items
  statistics  numbers of how often, when and for how much, each standardised (jobs.profile_users names them)

The basis is fitted on a bounded sample of users, without any label, and kept beside the model: `profile.safetensors`
and, written last, `profile.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse.linalg import svds

from jobs.errors import TrailvecError

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Counts: TypeAlias = (
    sp.csr_matrix
)  # float [users, numbers]; a column for each number that an item, category or statistic may have

PARTS = ("state", "items", "categories", "tastes", "statistics")
# How often and when says little of who somebody is: with more weight it drowns the tastes in a linear head. Trees read
# it at any weight.
WEIGHTS = {"state": 0.5, "items": 1.25, "categories": 1.0, "tastes": 1.0, "statistics": 0.5}
TENSORS, ABOUT = "profile.safetensors", "profile.json"


@dataclass(frozen=True)
class Terms:
    """How counts of one kind of thing are weighted: idf times (1 + log count), or alone; each user's row of length 1.

    Attributes:
        numbers: which ones count, ascending, [terms].
        idf: float32 [terms].
        presence: that a user has it at all is what counts. How often somebody buys an item hardly tells who they are,
            and once out of thirty thousand is enough to; of a few hundred categories everybody has most.
    """

    numbers: Integers
    idf: Floats
    presence: bool

    @staticmethod
    def fit(counts: Counts, most: int, presence: bool) -> Terms:
        """Of those that anybody has, the `most` that most users have (of equals the lower numbers)."""
        users = np.bincount(counts.indices, minlength=counts.shape[1])
        numbers = np.sort(np.argsort(-users, kind="stable")[: min(most, np.count_nonzero(users))])
        idf = np.log((1 + counts.shape[0]) / (1 + users[numbers])) + 1
        return Terms(numbers, idf.astype(np.float32), presence)

    def weigh(self, counts: Counts) -> sp.csr_matrix:
        """[users, numbers] → float64 [users, terms]; what is no term, or newer than the basis, counts nothing."""
        inside = self.numbers[self.numbers < counts.shape[1]]
        weights = sp.csr_matrix(counts[:, inside], dtype=np.float64)
        weights.data = np.ones_like(weights.data) if self.presence else 1 + np.log(np.maximum(weights.data, 1))
        weights = weights.multiply(self.idf[: len(inside)]).tocsr()
        weights.resize(counts.shape[0], len(self.numbers))
        lengths = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)))
        return weights.multiply(1 / np.where(lengths, lengths, 1)).tocsr()


@dataclass(frozen=True)
class Basis:
    """What makes profiles of counts and states.

    Attributes:
        names: of the statistics, in the order of their numbers.
        terms: of `items` and `categories`.
        directions: of `items`, `categories` and `tastes`, float32 [terms, width].
        shifts, scales: of each of PARTS, float32 [its width].
    """

    names: tuple[str, ...]
    terms: dict[str, Terms]
    directions: dict[str, Floats]
    shifts: dict[str, Floats]
    scales: dict[str, Floats]

    @property
    def widths(self) -> dict[str, int]:
        """How many places each part has, in the vector's order."""
        return {part: len(self.shifts[part]) for part in PARTS}

    def profiles(self, states: Floats, counts: Mapping[str, Counts]) -> Floats:
        """float32 [users, width].

        Args:
            states: float32 [users, the model's width].
            counts: of `items`, `categories` and `statistics`, [users, numbers].
        """
        parts = _parts(states, counts, self.terms, self.directions, len(self.names))
        return np.hstack([(parts[part] - self.shifts[part]) * self.scales[part] for part in PARTS]).astype(np.float32)


def _parts(
    states: Floats,
    counts: Mapping[str, Counts],
    terms: Mapping[str, Terms],
    directions: Mapping[str, Floats],
    statistics: int,
) -> dict[str, npt.NDArray[np.float64]]:
    items = terms["items"].weigh(counts["items"])
    return {
        "state": states.astype(np.float64),
        "items": np.asarray(items @ directions["items"]),
        "categories": np.asarray(terms["categories"].weigh(counts["categories"]) @ directions["categories"]),
        "tastes": np.asarray(items @ directions["tastes"]),
        "statistics": np.asarray(counts["statistics"][:, :statistics].toarray()),
    }


def fit_terms(counts: Mapping[str, Counts], most: int) -> dict[str, Terms]:
    """The terms of `items` and `categories`, at most so many of each."""
    return {kind: Terms.fit(counts[kind], most, presence=kind == "items") for kind in ("items", "categories")}


def fit_basis(
    states: Floats,
    counts: Mapping[str, Counts],
    *,
    names: tuple[str, ...],
    terms: dict[str, Terms],
    item_vectors: Floats,
    width: int,
) -> Basis:
    """The basis of a sample of users.

    Args:
        states, counts: as in `Basis.profiles`.
        item_vectors: the model's, of the terms of `items`, [terms, its width]; zeros where it has none.
        width: singular directions of items and of categories; fewer where there are fewer.
    """
    lengths = np.linalg.norm(item_vectors, axis=1, keepdims=True)
    directions = {kind: _singular(terms[kind].weigh(counts[kind]), width) for kind in terms}
    directions["tastes"] = (item_vectors / np.where(lengths, lengths, 1)).astype(np.float32)
    shifts, scales = {}, {}
    for part, values in _parts(states, counts, terms, directions, len(names)).items():
        spread = values.std(axis=0)
        if part == "statistics":  # each of another unit
            scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0) / np.sqrt(max(1, values.shape[1]))
        else:  # a state's or a direction's places have lengths that mean something: one factor for all
            scale = np.full(values.shape[1], 1 / max(float(np.sqrt((spread**2).sum())), 1e-9))
        shifts[part] = values.mean(axis=0).astype(np.float32)
        scales[part] = (scale * WEIGHTS[part]).astype(np.float32)
    return Basis(names, terms, directions, shifts, scales)


def _singular(weights: sp.csr_matrix, width: int) -> Floats:
    """The first right singular directions, the largest first, float32 [terms, width], signs chosen."""
    width = min(width, *(size - 1 for size in weights.shape))
    if width < 1 or not weights.nnz:
        return np.zeros((weights.shape[1], 1), np.float32)
    start = np.random.default_rng(0).normal(size=min(weights.shape))
    _, values, rows = svds(weights, width, v0=start)
    rows = rows[np.argsort(-values, kind="stable")]
    signs = np.sign(np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1))
    return np.ascontiguousarray((rows * np.where(signs, signs, 1)).T, np.float32)


def write_basis(folder: Path, basis: Basis, about: dict[str, object]) -> None:
    """Writes both files into a model's folder, each whole or not at all, the JSON last."""
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for kind, of_kind in basis.terms.items():
        tensors |= {f"{kind}.numbers": of_kind.numbers, f"{kind}.idf": of_kind.idf}
    tensors |= {f"{part}.directions": values for part, values in basis.directions.items()}
    for part in PARTS:
        tensors |= {f"{part}.shift": basis.shifts[part], f"{part}.scale": basis.scales[part]}
    staged = folder / f".{TENSORS}.part"
    save_file(tensors, staged)
    sha256 = hashlib.sha256(staged.read_bytes()).hexdigest()
    staged.replace(folder / TENSORS)
    text = json.dumps({**about, "widths": basis.widths, "statistics": basis.names, "sha256": sha256}, indent=2)
    staged = folder / f".{ABOUT}.part"
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(folder / ABOUT)


def read_basis(folder: Path) -> tuple[Basis, dict[str, object]] | None:
    """What `write_basis` wrote, and what was said about it; None where the model has none yet.

    Raises:
        TrailvecError: a file is damaged.
    """
    if not (folder / ABOUT).exists():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() != about["sha256"]:
            raise ValueError("it is not the file that was written")
        tensors = load_file(folder / TENSORS)
        terms = {
            kind: Terms(tensors[f"{kind}.numbers"], tensors[f"{kind}.idf"], presence=kind == "items")
            for kind in ("items", "categories")
        }
        basis = Basis(
            tuple(about["statistics"]),
            terms,
            {part: tensors[f"{part}.directions"] for part in ("items", "categories", "tastes")},
            {part: tensors[f"{part}.shift"] for part in PARTS},
            {part: tensors[f"{part}.scale"] for part in PARTS},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrailvecError(
            f"the profile's basis in {folder} is damaged ({error}): remove {ABOUT} and {TENSORS} there, and "
            f"`trailvec profile_users` makes another"
        ) from None
    return basis, about
