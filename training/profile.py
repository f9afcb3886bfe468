"""The profile: a second vector per user, for other teams' models. The vector in the items' space stays as it is.

A profile concatenates PARTS. Each part is centred and scaled to the same root-mean-square norm over the users that the
basis was fitted on, so that WEIGHTS alone sets its weight, whatever its width:

  state       the model's state after the user's last action: what comes next, and the order of past actions
  items       which items, over the whole history: TF-IDF projected on its first singular directions. An item weighs
              more if the user takes more of it at once than others do (a rating is a quantity too)
  amounts     which items the user takes more of than others do, and which less; projected likewise
  words       the words in the items' names, projected likewise: items that hardly anyone takes both of may share words
  categories  the items' categories, projected likewise
  statistics  how often, when and for how much the user acts, each standardised (jobs.profile_users names them)
  forecast    on how many days of the next week, and of the next four, the user will act: a ridge regression from the
              statistics of four weeks ago to what came since, applied to the current statistics

The basis is fitted on a bounded sample of users, without any label, and stored beside the model: `profile.safetensors`
and, written last, `profile.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse.linalg import svds

from jobs.errors import TrailvecError
from training.arrays import Float32, Float64, Int64
from training.stores import sha256_of, write_whole

Counts: TypeAlias = (
    sp.csr_matrix
)  # float [users, numbers]; a column for each number that an item, category or statistic may have

PARTS = ("state", "items", "amounts", "words", "categories", "statistics", "forecast")
# Statistics say little about who somebody is: with more weight they would drown out, in a linear head, what somebody
# buys. The forecast's two numbers say most about what comes next.
WEIGHTS = {
    "state": 0.5,
    "items": 2.0,
    "amounts": 0.5,
    "words": 1.25,
    "categories": 0.5,
    "statistics": 0.25,
    "forecast": 1.0,
}
_DIRECTIONS = ("items", "amounts", "words", "categories", "forecast")
_LEAST, _MOST = 0.1, 4.0  # bounds of an amount relative to the item's usual one: limits typos such as 1,000 pieces
_RIDGE = 30.0  # the L2 penalty, on statistics of standard deviation 1
AT_ONCE = 512  # users to weigh the counts of at once: it takes half a kilobyte for each item that a user has
TENSORS, ABOUT = "profile.safetensors", "profile.json"


@dataclass(frozen=True)
class Terms:
    """TF-IDF weighting of one kind of counts: idf, times (1 + log count) unless `presence`; each user's row has norm 1.

    Attributes:
        numbers: the terms, ascending, [terms].
        idf: float32 [terms].
        presence: only whether a user has a term counts, not how often. True for items: having bought one out of thirty
            thousand says who somebody is, how often says little. False for categories: of a few hundred, everybody has
            most.
    """

    numbers: Int64
    idf: Float32
    presence: bool

    @staticmethod
    def fit(counts: Counts, most: int, presence: bool) -> Terms:
        """The `most` numbers that most users have, ties to the lower numbers; numbers that nobody has are no terms."""
        numbers, users = np.unique(counts.indices, return_counts=True)
        first = np.sort(np.argsort(-users, kind="stable")[:most])
        idf = np.log((1 + counts.shape[0]) / (1 + users[first])) + 1
        return Terms(numbers[first].astype(np.int64), idf.astype(np.float32), presence)

    def present(self, counts: Counts) -> sp.csr_matrix:
        """[users, numbers] → whether a user has each term, 0 or 1, float64 [users, terms]."""
        matrix = self._of(counts)
        matrix.data = np.ones_like(matrix.data)
        return matrix

    def weigh(self, counts: Counts) -> sp.csr_matrix:
        """[users, numbers] → float64 [users, terms]; non-terms and numbers newer than the basis are ignored."""
        weights = self._of(counts)
        weights.data = np.ones_like(weights.data) if self.presence else 1 + np.log(np.maximum(weights.data, 1))
        return _unit(weights.multiply(self.idf).tocsr())

    def beside(self, counts: Counts, usual: Float32) -> sp.csr_matrix:
        """[users, numbers] → each amount relative to the term's usual one, clipped, float64 [users, terms]; 1 where
        either is unknown (0)."""
        matrix = self._of(counts)
        often = usual[matrix.indices]
        known = (matrix.data > 0) & (often > 0)
        ratio = np.divide(matrix.data, often, out=np.ones_like(matrix.data), where=known)
        matrix.data = np.clip(ratio, _LEAST, _MOST)
        return matrix

    def usual(self, counts: Counts) -> Float32:
        """Each term's mean amount over the users with a known one, float32 [terms]; 0 if there are none."""
        matrix = self._of(counts)
        known = matrix.data > 0
        terms, amounts = matrix.indices[known], matrix.data[known]
        users = np.bincount(terms, minlength=len(self.numbers))
        sums = np.bincount(terms, amounts, minlength=len(self.numbers))
        means: Float32 = (sums / np.maximum(users, 1)).astype(np.float32)
        return means

    def _of(self, counts: Counts) -> sp.csr_matrix:
        """The counts of the terms, float64 [users, terms]."""
        # scipy's own indexing would allocate memory for every possible item number, at each call.
        places = np.searchsorted(self.numbers, counts.indices)
        known = np.append(self.numbers, -1)[places] == counts.indices
        offsets = np.append(0, np.cumsum(known))[counts.indptr]
        data = counts.data[known].astype(np.float64)
        return sp.csr_matrix((data, places[known], offsets), (counts.shape[0], len(self.numbers)))


def _unit(rows: sp.csr_matrix) -> sp.csr_matrix:
    """The rows scaled to norm 1; zero rows stay zero."""
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)))
    return rows.multiply(1 / np.where(lengths, lengths, 1)).tocsr()


def _more_and_less(beside: sp.csr_matrix) -> sp.csr_matrix:
    """Logarithms of the relative amounts, minus the user's own mean; rows of norm 1."""
    logarithms = beside.copy()
    logarithms.data = np.log(logarithms.data)
    each = np.diff(logarithms.indptr)
    means = np.asarray(logarithms.sum(axis=1)).ravel() / np.maximum(each, 1)
    logarithms.data = logarithms.data - np.repeat(means, each)
    logarithms.data[np.abs(logarithms.data) < 1e-9] = 0  # equal up to rounding: must not become a direction
    logarithms.eliminate_zeros()
    return _unit(logarithms)


@dataclass(frozen=True)
class Basis:
    """The fitted transformation from counts and states to profiles.

    Attributes:
        names: of the statistics, in the order of their numbers.
        words: which words each item's name contains, 0 or 1, float64 [terms of `items`, words].
        terms: of `items`, `words` and `categories`.
        usual: the mean amount of an item taken at once, float32 [terms of `items`].
        directions: of `items`, `amounts`, `words` and `categories`, float32 [terms, width]; of `forecast`
            [statistics, 2].
        shifts, scales: of each of PARTS, float32 [its width].
    """

    names: tuple[str, ...]
    words: sp.csr_matrix
    terms: dict[str, Terms]
    usual: Float32
    directions: dict[str, Float32]
    shifts: dict[str, Float32]
    scales: dict[str, Float32]

    @property
    def widths(self) -> dict[str, int]:
        """Each part's dimensions, in the vector's order."""
        return {part: len(self.shifts[part]) for part in PARTS}

    def profiles(self, states: Float32, counts: Mapping[str, Counts]) -> Float32:
        """float32 [users, width].

        Args:
            states: float32 [users, the model's width].
            counts: each [users, numbers]: `items`, how much of it the user takes at once (0: unknown); `categories`,
                how often; `statistics`, their values.

        Raises:
            TrailvecError: a count is not finite.
        """
        _refuse_infinite(counts, self.names)
        parts = _parts(states, counts, _weighed(counts, self.words, self.terms, self.usual), self.directions)
        return np.hstack([(parts[part] - self.shifts[part]) * self.scales[part] for part in PARTS]).astype(np.float32)


def _refuse_infinite(counts: Mapping[str, Counts], names: Sequence[str]) -> None:
    """A single one would make the basis, and with it every user's profile, NaN."""
    for kind, of in counts.items():
        found = np.unique(of.indices[~np.isfinite(of.data)]).tolist()
        if found:
            what = "quantity" if kind == "items" else " and ".join(names[n] for n in found)
            raise TrailvecError(
                f"users have infinite statistics ({what}): table events holds amounts or quantities of 1e100 or more, "
                f"which ingest now refuses: rebuild the events as in Backfill in docs/operations.md"
            )


def _weighed(
    counts: Mapping[str, Counts], words: sp.csr_matrix, terms: Mapping[str, Terms], usual: Float32
) -> dict[str, sp.csr_matrix]:
    """Per kind, the weighted matrix, float64 [users, terms], that the basis takes singular directions of and that is
    projected on them."""
    beside = terms["items"].beside(counts["items"], usual)
    return {
        "items": _unit(terms["items"].weigh(counts["items"]).multiply(beside).tocsr()),
        "amounts": _more_and_less(beside),
        "words": terms["words"].weigh(terms["items"].present(counts["items"]) @ words),
        "categories": terms["categories"].weigh(counts["categories"]),
    }


def _parts(
    states: Float32,
    counts: Mapping[str, Counts],
    weighed: Mapping[str, sp.csr_matrix],
    directions: Mapping[str, Float32],
) -> dict[str, Float64]:
    statistics = np.zeros((len(states), len(directions["forecast"])))
    values = counts["statistics"][:, : statistics.shape[1]].toarray()
    statistics[:, : values.shape[1]] = values
    return {
        "state": states.astype(np.float64),
        **{part: np.asarray(weights @ directions[part]) for part, weights in weighed.items()},
        "statistics": statistics,
        "forecast": statistics @ directions["forecast"].astype(np.float64),
    }


def fit_basis(
    states: Float32,
    counts: Mapping[str, Counts],
    *,
    names: tuple[str, ...],
    items: Terms,
    item_names: Sequence[str],
    before: Counts,
    since: Float64,
    item_width: int,
    width: int,
    most: int,
) -> Basis:
    """The basis of a sample of users.

    Args:
        states, counts: as in `Basis.profiles`.
        names: of the statistics.
        items: `Terms.fit` of the same counts, by presence.
        item_names: of those items, in the order of their numbers; "" for an item without a name.
        before: past statistics of some of the users, [past users, statistics].
        since: log(1 + days on which they have acted since then), [past users, horizons].
        item_width: number of singular directions of items; fewer if there are fewer.
        width: number of those of amounts, of words and of categories.
        most: maximum number of words, and of categories.

    Raises:
        TrailvecError: a count is not finite.
    """
    _refuse_infinite(counts, names)
    _refuse_infinite({"statistics": before}, names)
    words = _words(item_names, most)
    terms = {
        "items": items,
        "words": Terms.fit(items.present(counts["items"]) @ words, most, presence=False),
        "categories": Terms.fit(counts["categories"], most, presence=False),
    }
    usual = items.usual(counts["items"])
    blocks = [
        _weighed({kind: of[start : start + AT_ONCE] for kind, of in counts.items()}, words, terms, usual)
        for start in range(0, len(states), AT_ONCE)
    ]
    weighed = {kind: sp.vstack([block.pop(kind) for block in blocks], "csr") for kind in list(blocks[0])}
    directions = {kind: _singular(of, item_width if kind == "items" else width) for kind, of in weighed.items()}
    directions["forecast"] = _ridge(before, since, len(names))
    shifts, scales = {}, {}
    for part, values in _parts(states, counts, weighed, directions).items():
        spread = values.std(axis=0)
        if part == "statistics":  # different units: each its own factor
            spread *= np.sqrt(max(1, values.shape[1]))
        else:  # relative scales within a state or projection carry meaning: one factor for all
            spread = np.full(values.shape[1], np.sqrt((spread**2).sum()))
        # What is constant in the sample is always 0: a large factor would blow up a later user's small deviation.
        scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0)
        shifts[part] = values.mean(axis=0).astype(np.float32)
        scales[part] = (scale * WEIGHTS[part]).astype(np.float32)
    return Basis(names, words, terms, usual, directions, shifts, scales)


def _words(names: Sequence[str], most: int) -> sp.csr_matrix:
    """Which of the `most` most frequent words and word pairs each name has: 0 or 1, float64 [names, words]. A word is
    two or more letters or digits: a year or a package size is informative, too."""
    from sklearn.feature_extraction.text import CountVectorizer  # noqa: PLC0415 - a second, and only fitting needs it

    counter = CountVectorizer(ngram_range=(1, 2), binary=True, max_features=most, dtype=np.float64)
    try:
        return counter.fit_transform(names).tocsr()
    except ValueError:  # no name has a word
        return sp.csr_matrix((len(names), 1))


def _ridge(before: Counts, since: Float64, statistics: int) -> Float32:
    """The coefficients that predict `since` from statistics, without the intercept, float32 [statistics, horizons]."""
    from sklearn.linear_model import Ridge  # noqa: PLC0415

    weights = np.zeros((statistics, since.shape[1]), np.float32)
    if not len(since):
        return weights
    features = before[:, :statistics].toarray()
    spread = features.std(axis=0)
    known = np.flatnonzero(spread > 1e-9)
    if len(known):
        coefficients = Ridge(_RIDGE).fit(features[:, known] / spread[known], since).coef_.T / spread[known, None]
        weights[known] = coefficients.reshape(len(known), -1)
    return weights


def _singular(weights: sp.csr_matrix, width: int) -> Float32:
    """The first right singular vectors, largest singular value first, float32 [terms, width], with fixed signs."""
    width = min(width, *(size - 1 for size in weights.shape))
    if width < 1 or not weights.nnz:
        return np.zeros((weights.shape[1], 1), np.float32)
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - comes with scikit-learn, and only fitting needs it

    start = np.random.default_rng(0).normal(size=min(weights.shape))
    # As for the heads in training/probes.py: on a busy machine it would wait for threads longer than it computes.
    with threadpool_limits(1):
        _, values, rows = svds(weights, width, v0=start)
    rows = rows[np.argsort(-values, kind="stable")]
    signs = np.sign(np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1))
    return np.ascontiguousarray((rows * np.where(signs, signs, 1)).T, np.float32)


def write_basis(folder: Path, basis: Basis, about: dict[str, object]) -> str:
    """Writes both files into a model's folder, each atomically; the JSON, which makes them a basis, comes last.
    Returns the `sha256` that it states."""
    (folder / ABOUT).unlink(missing_ok=True)
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "words.starts": basis.words.indptr.astype(np.int64),
        "words.places": basis.words.indices.astype(np.int64),
        "items.usual": basis.usual,
    }
    for kind, of_kind in basis.terms.items():
        tensors |= {f"{kind}.numbers": of_kind.numbers, f"{kind}.idf": of_kind.idf}
    tensors |= {f"{part}.directions": values for part, values in basis.directions.items()}
    for part in PARTS:
        tensors |= {f"{part}.shift": basis.shifts[part], f"{part}.scale": basis.scales[part]}
    staged = folder / f".{TENSORS}.part"
    save_file(tensors, staged)
    sha256 = sha256_of(staged)
    staged.replace(folder / TENSORS)
    fields = {"widths": basis.widths, "statistics": basis.names, "words": basis.words.shape[1], "sha256": sha256}
    text = json.dumps({**about, **fields}, indent=2)
    write_whole(folder / ABOUT, text + "\n")
    return sha256


def read_basis(folder: Path) -> tuple[Basis, dict[str, Any]] | None:
    """The basis that `write_basis` wrote, and the content of its JSON; None if the model has none yet.

    Raises:
        TrailvecError: a file is damaged.
    """
    if not (folder / ABOUT).exists():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if sha256_of(folder / TENSORS) != about["sha256"]:
            raise ValueError(f"{TENSORS} is not the file that {ABOUT} was written for")
        tensors = load_file(folder / TENSORS)
        terms = {
            kind: Terms(tensors[f"{kind}.numbers"], tensors[f"{kind}.idf"], presence=kind == "items")
            for kind in ("items", "words", "categories")
        }
        starts, places = tensors["words.starts"], tensors["words.places"]
        basis = Basis(
            tuple(about["statistics"]),
            sp.csr_matrix((np.ones(len(places)), places, starts), (len(starts) - 1, about["words"])),
            terms,
            tensors["items.usual"],
            {part: tensors[f"{part}.directions"] for part in _DIRECTIONS},
            {part: tensors[f"{part}.shift"] for part in PARTS},
            {part: tensors[f"{part}.scale"] for part in PARTS},
        )
        if not all(np.isfinite(of).all() for part in PARTS for of in (basis.shifts[part], basis.scales[part])):
            raise ValueError("its numbers are not finite")
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise TrailvecError(
            f"the profile's basis in {folder} is damaged ({error}): remove {ABOUT} and {TENSORS} there, and "
            f"`trailvec profile_users --force` fits a new one"
        ) from None
    return basis, about
