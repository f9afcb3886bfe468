"""The profile: a second vector of a user, for other teams' models. The one in the items' space stays as it is.

A profile is PARTS side by side. Each is centred and brought to one length over the users that the basis was fitted on,
so that a part weighs what WEIGHTS says, however many places it has:

  state       the model's state after the user's last action: what comes next, and in which order things came
  items       which items, over the whole history: TF-IDF in its first singular directions. An item weighs more, the
              more of it the user takes at once beside what others take (a rating is a quantity too)
  amounts     of which items the user takes more than others do, and of which less, in singular directions too
  words       the words in the items' names, likewise: items that hardly any user has both of may share words
  categories  the items' categories, likewise
  statistics  numbers of how often, when and for how much, each standardised (jobs.profile_users names them)
  forecast    on how many days of the next week, and of the next four, the user will act: a ridge regression from the
              statistics of four weeks ago to what came since, applied to the statistics of now

The basis is fitted on a bounded sample of users, without any label, and kept beside the model: `profile.safetensors`
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
from training.stores import sha256_of, write_whole

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Counts: TypeAlias = (
    sp.csr_matrix
)  # float [users, numbers]; a column for each number that an item, category or statistic may have

PARTS = ("state", "items", "amounts", "words", "categories", "statistics", "forecast")
# Statistics say little of who somebody is: with more weight they would drown, in a linear head, what somebody buys. The
# two numbers of the forecast say most about what comes next.
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
_LEAST, _MOST = 0.1, 4.0  # an amount beside the item's usual one: a slip of the keyboard is not a thousand of them
_RIDGE = 30.0  # the penalty, on statistics of spread 1
TENSORS, ABOUT = "profile.safetensors", "profile.json"


@dataclass(frozen=True)
class Terms:
    """How counts of one kind of thing are weighted: idf times (1 + log count), or alone; each user's row of length 1.

    Attributes:
        numbers: which ones count, ascending, [terms].
        idf: float32 [terms].
        presence: only whether a user has it counts, not how often. So for items: to have bought one out of thirty
            thousand tells who somebody is, how often hardly does. Not for categories: of a few hundred everybody has
            most.
    """

    numbers: Integers
    idf: Floats
    presence: bool

    @staticmethod
    def fit(counts: Counts, most: int, presence: bool) -> Terms:
        """Of those that anybody has, the `most` that most users have (of equals the lower numbers)."""
        numbers, users = np.unique(counts.indices, return_counts=True)
        first = np.sort(np.argsort(-users, kind="stable")[:most])
        idf = np.log((1 + counts.shape[0]) / (1 + users[first])) + 1
        return Terms(numbers[first].astype(np.int64), idf.astype(np.float32), presence)

    def present(self, counts: Counts) -> sp.csr_matrix:
        """[users, numbers] → which terms a user has at all, 0 or 1, float64 [users, terms]."""
        found = self._of(counts)
        found.data = np.ones_like(found.data)
        return found

    def weigh(self, counts: Counts) -> sp.csr_matrix:
        """[users, numbers] → float64 [users, terms]; what is no term, or newer than the basis, counts nothing."""
        weights = self._of(counts)
        weights.data = np.ones_like(weights.data) if self.presence else 1 + np.log(np.maximum(weights.data, 1))
        return _unit(weights.multiply(self.idf).tocsr())

    def beside(self, counts: Counts, usual: Floats) -> sp.csr_matrix:
        """[users, numbers] → each amount divided by the term's usual one, within bounds, float64 [users, terms]; 1
        where one of the two is not known (0)."""
        found = self._of(counts)
        often = usual[found.indices]
        known = (found.data > 0) & (often > 0)
        ratio = np.divide(found.data, often, out=np.ones_like(found.data), where=known)
        found.data = np.clip(ratio, _LEAST, _MOST)
        return found

    def usual(self, counts: Counts) -> Floats:
        """Each term's mean amount over the users of whom it is known, float32 [terms]; 0 where it is of nobody."""
        found = self._of(counts)
        known = found.data > 0
        terms, amounts = found.indices[known], found.data[known]
        users = np.bincount(terms, minlength=len(self.numbers))
        sums = np.bincount(terms, amounts, minlength=len(self.numbers))
        means: Floats = (sums / np.maximum(users, 1)).astype(np.float32)
        return means

    def _of(self, counts: Counts) -> sp.csr_matrix:
        """The counts of the terms, float64 [users, terms]."""
        # By scipy's own indexing each call would take memory for every number that an item may have.
        places = np.searchsorted(self.numbers, counts.indices)
        known = np.append(self.numbers, -1)[places] == counts.indices
        offsets = np.append(0, np.cumsum(known))[counts.indptr]
        data = counts.data[known].astype(np.float64)
        return sp.csr_matrix((data, places[known], offsets), (counts.shape[0], len(self.numbers)))


def _unit(rows: sp.csr_matrix) -> sp.csr_matrix:
    """The rows at length 1; those of zeros stay."""
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)))
    return rows.multiply(1 / np.where(lengths, lengths, 1)).tocsr()


def _more_and_less(beside: sp.csr_matrix) -> sp.csr_matrix:
    """Logarithms of amounts beside the usual ones, less the user's own mean, rows of length 1."""
    found = beside.copy()
    found.data = np.log(found.data)
    each = np.diff(found.indptr)
    means = np.asarray(found.sum(axis=1)).ravel() / np.maximum(each, 1)
    found.data = found.data - np.repeat(means, each)
    found.data[np.abs(found.data) < 1e-9] = 0  # one and the same for all, but for rounding: no direction
    found.eliminate_zeros()
    return _unit(found)


@dataclass(frozen=True)
class Basis:
    """What makes profiles of counts and states.

    Attributes:
        names: of the statistics, in the order of their numbers.
        words: which words the name of an item has, 0 or 1, float64 [terms of `items`, words].
        terms: of `items`, `words` and `categories`.
        usual: how much of an item is mostly taken at once, float32 [terms of `items`].
        directions: of `items`, `amounts`, `words` and `categories`, float32 [terms, width]; of `forecast`
            [statistics, 2].
        shifts, scales: of each of PARTS, float32 [its width].
    """

    names: tuple[str, ...]
    words: sp.csr_matrix
    terms: dict[str, Terms]
    usual: Floats
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
            counts: of `items` how much of it the user takes at once (0: not known), of `categories` how often, of
                `statistics` their values, [users, numbers].
        """
        parts = _parts(states, counts, _weighed(counts, self.words, self.terms, self.usual), self.directions)
        return np.hstack([(parts[part] - self.shifts[part]) * self.scales[part] for part in PARTS]).astype(np.float32)


def _weighed(
    counts: Mapping[str, Counts], words: sp.csr_matrix, terms: Mapping[str, Terms], usual: Floats
) -> dict[str, sp.csr_matrix]:
    """The weighted matrices whose singular directions the basis holds, and which are multiplied by them to give the
    parts of a profile: float64 [users, terms] of each kind."""
    beside = terms["items"].beside(counts["items"], usual)
    return {
        "items": _unit(terms["items"].weigh(counts["items"]).multiply(beside).tocsr()),
        "amounts": _more_and_less(beside),
        "words": terms["words"].weigh(terms["items"].present(counts["items"]) @ words),
        "categories": terms["categories"].weigh(counts["categories"]),
    }


def _parts(
    states: Floats,
    counts: Mapping[str, Counts],
    weighed: Mapping[str, sp.csr_matrix],
    directions: Mapping[str, Floats],
) -> dict[str, npt.NDArray[np.float64]]:
    told = np.zeros((len(states), len(directions["forecast"])))
    given = counts["statistics"][:, : told.shape[1]].toarray()
    told[:, : given.shape[1]] = given
    return {
        "state": states.astype(np.float64),
        **{part: np.asarray(weights @ directions[part]) for part, weights in weighed.items()},
        "statistics": told,
        "forecast": told @ directions["forecast"].astype(np.float64),
    }


def fit_basis(
    states: Floats,
    counts: Mapping[str, Counts],
    *,
    names: tuple[str, ...],
    items: Terms,
    item_names: Sequence[str],
    before: Counts,
    since: npt.NDArray[np.float64],
    item_width: int,
    width: int,
    most: int,
) -> Basis:
    """The basis of a sample of users.

    Args:
        states, counts: as in `Basis.profiles`.
        names: of the statistics.
        items: `Terms.fit` of the same counts, by presence.
        item_names: of those items, in the order of their numbers; "" where one has none.
        before: statistics of some of the users as they were once, [users once, statistics].
        since: the logarithms of 1 and the days on which they acted since then, [users once, horizons].
        item_width: singular directions of items; fewer where there are fewer.
        width: those of amounts, of words and of categories.
        most: words and categories, at most.
    """
    words = _words(item_names, most)
    of_words = items.present(counts["items"]) @ words
    terms = {
        "items": items,
        "words": Terms.fit(of_words, most, presence=False),
        "categories": Terms.fit(counts["categories"], most, presence=False),
    }
    usual = items.usual(counts["items"])
    weighed = _weighed(counts, words, terms, usual)
    directions = {kind: _singular(of, item_width if kind == "items" else width) for kind, of in weighed.items()}
    directions["forecast"] = _ridge(before, since, len(names))
    shifts, scales = {}, {}
    for part, values in _parts(states, counts, weighed, directions).items():
        spread = values.std(axis=0)
        if part == "statistics":  # each of another unit
            spread *= np.sqrt(max(1, values.shape[1]))
        else:  # a state's or a direction's places have lengths that mean something: one factor for all
            spread = np.full(values.shape[1], np.sqrt((spread**2).sum()))
        # What is the same for all of the fit is 0 for good: another factor would make much of a later user's little.
        scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0)
        shifts[part] = values.mean(axis=0).astype(np.float32)
        scales[part] = (scale * WEIGHTS[part]).astype(np.float32)
    return Basis(names, words, terms, usual, directions, shifts, scales)


def _words(names: Sequence[str], most: int) -> sp.csr_matrix:
    """Which words and pairs of words, of those that most names have, each name has: 0 or 1, float64 [names, words]. A
    word is two letters or digits, or more: a year and a package's size tell something too."""
    from sklearn.feature_extraction.text import CountVectorizer  # noqa: PLC0415 - a second, and only fitting needs it

    counter = CountVectorizer(ngram_range=(1, 2), binary=True, max_features=most, dtype=np.float64)
    try:
        return counter.fit_transform(names).tocsr()
    except ValueError:  # no name has a word
        return sp.csr_matrix((len(names), 1))


def _ridge(before: Counts, since: npt.NDArray[np.float64], statistics: int) -> Floats:
    """What to multiply statistics by to foretell `since`, but for a constant, float32 [statistics, horizons]."""
    from sklearn.linear_model import Ridge  # noqa: PLC0415

    weights = np.zeros((statistics, since.shape[1]), np.float32)
    if not len(since):
        return weights
    told = before[:, :statistics].toarray()
    spread = told.std(axis=0)
    known = np.flatnonzero(spread > 1e-9)
    if len(known):
        found = Ridge(_RIDGE).fit(told[:, known] / spread[known], since).coef_.T / spread[known, None]
        weights[known] = found.reshape(len(known), -1)
    return weights


def _singular(weights: sp.csr_matrix, width: int) -> Floats:
    """The first right singular directions, the largest first, float32 [terms, width], signs chosen."""
    width = min(width, *(size - 1 for size in weights.shape))
    if width < 1 or not weights.nnz:
        return np.zeros((weights.shape[1], 1), np.float32)
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - comes with scikit-learn, and only fitting needs it

    start = np.random.default_rng(0).normal(size=min(weights.shape))
    # As for the heads of training/probes.py: on a busy machine it waits for threads longer than it computes.
    with threadpool_limits(1):
        _, values, rows = svds(weights, width, v0=start)
    rows = rows[np.argsort(-values, kind="stable")]
    signs = np.sign(np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1))
    return np.ascontiguousarray((rows * np.where(signs, signs, 1)).T, np.float32)


def write_basis(folder: Path, basis: Basis, about: dict[str, object]) -> None:
    """Writes both files into a model's folder, each whole or not at all, the JSON, which makes them a basis, last."""
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
    told = {"widths": basis.widths, "statistics": basis.names, "words": basis.words.shape[1], "sha256": sha256}
    text = json.dumps({**about, **told}, indent=2)
    write_whole(folder / ABOUT, text + "\n")


def read_basis(folder: Path) -> tuple[Basis, dict[str, Any]] | None:
    """What `write_basis` wrote, and what was said about it; None where the model has none yet.

    Raises:
        TrailvecError: a file is damaged.
    """
    if not (folder / ABOUT).exists():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if sha256_of(folder / TENSORS) != about["sha256"]:
            raise ValueError("it is not the file that was written")
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise TrailvecError(
            f"the profile's basis in {folder} is damaged ({error}): remove {ABOUT} and {TENSORS} there, and "
            f"`trailvec profile_users` makes another"
        ) from None
    return basis, about
