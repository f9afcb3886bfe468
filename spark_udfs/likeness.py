"""How much users are like some users, or like some items: the scores of many segments in one pass over the vectors.

A segment is a few anchors; a user's score is their vector's highest cosine, or dot product, with any of them.
`anchors_of` makes the anchors of a seed list; `candidates` scores all users for all segments as matrix products, and
gives those that reach their segment's floor: it holds one batch, however many users or members there are. A score is
what vector_cosine_similarity or vector_inner_product gives for the two vectors, to the bit, as in spark_udfs.topk, for
the same reason: a float32 product rounds by its shape, so it only picks what may reach the floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame

from spark_udfs.topk import Metric, Vectors
from spark_udfs.vectors import cosine_similarity, inner_product

Method = Literal["nearest_seed", "tastes", "classifier"]
DEFAULT_METHOD: Method = "classifier"  # finds most of hidden redeemers: scripts/bench/lookalike.py
Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_SCORERS = {"dot": inner_product, "cosine": cosine_similarity}
_ANCHORS_AT_ONCE = 1024  # of several segments, in one product
_PRODUCTS_AT_ONCE = 1 << 20  # 4 MB: stays in the processor's cache
_PAIRS_AT_ONCE = 1 << 16
_RIDGE = 0.1  # of the classifier, over standardised coordinates


class Anchors(NamedTuple):
    """What a segment's users are compared with: float32 [anchors, width], none zero, and how."""

    vectors: Vectors
    metric: Metric


# ---- anchors of a seed list ---------------------------------------------------------------------------------------


def anchors_of(method: Method, seeds: Vectors, others: Vectors, tastes: int) -> Anchors:
    """The anchors of seeds. The same seeds in the same order give the same anchors.

    Args:
        seeds, others: [n, width], none zero; `others` is a sample of the users who are no seeds.
        tastes: how many centres the method of that name looks for.
    """
    if method == "nearest_seed":
        return Anchors(np.unique(seeds, axis=0), "cosine")
    if method == "tastes":
        return Anchors(_centres(_unit(seeds), tastes), "cosine")
    return Anchors(np.asarray(direction_of(_unit(seeds), _unit(others))[None], np.float32), "cosine")


def _centres(unit: Vectors, count: int) -> Vectors:
    """At most `count` centres by k-means; a centre of opposite vectors that is zero is no direction and left out."""
    from scipy.cluster.vq import kmeans2  # noqa: PLC0415 - only the driver needs it

    distinct = np.unique(unit, axis=0)
    if len(distinct) <= count:
        return np.asarray(distinct, np.float32)
    centres, labels = kmeans2(unit.astype(np.float64), count, iter=50, minit="++", missing="warn", seed=0)
    found = np.asarray(centres[np.unique(labels)], np.float32)
    found = found[found.any(axis=1)]
    return found if len(found) else np.asarray(distinct[:count], np.float32)


def direction_of(seeds: Numbers | Vectors, others: Numbers | Vectors) -> Numbers:
    """[width]: the weights of a logistic regression, seeds against others, both sides weighing the same."""
    from scipy.optimize import minimize  # noqa: PLC0415

    rows = np.concatenate([seeds, others]).astype(np.float64)
    spread = rows.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    standard = (rows - rows.mean(axis=0)) / scale
    sign = np.concatenate([np.ones(len(seeds)), -np.ones(len(others))])
    weight = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (seeds, others) if len(part)])

    def loss(point: Numbers) -> tuple[float, Numbers]:
        margin = sign * (standard @ point[1:] + point[0])
        slope = -weight * sign * np.exp(-np.logaddexp(0, margin))
        gradient = np.concatenate([[slope.sum()], standard.T @ slope + _RIDGE * point[1:]])
        return float(weight @ np.logaddexp(0, -margin) + _RIDGE / 2 * point[1:] @ point[1:]), gradient

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B").x[1:] / scale
    # Without others, or with others just like them, nothing parts the seeds: their mean is all they say.
    return np.asarray(found if found.any() else rows[: len(seeds)].mean(axis=0))


# ---- scores -------------------------------------------------------------------------------------------------------


class Scorer:
    """The scores of many segments."""

    def __init__(self, anchors: Sequence[Anchors]) -> None:
        self._anchors = anchors
        # No anchor is longer than 1, so that the bound of the rounding error holds and nothing overflows.
        self._longest = [1.0 if a.metric == "cosine" else float(_lengths(a.vectors).max()) or 1.0 for a in anchors]
        self._groups: list[tuple[Vectors, list[tuple[int, int, int]]]] = []  # stacked; (segment, first, last + 1)
        for group in _together([len(a.vectors) for a in anchors]):
            parts = [
                _unit(anchors[n].vectors)
                if anchors[n].metric == "cosine"
                else np.asarray(anchors[n].vectors / self._longest[n], np.float32)
                for n in group
            ]
            ends = np.cumsum([len(part) for part in parts])
            places = [(n, int(end) - len(part), int(end)) for n, part, end in zip(group, parts, ends, strict=True)]
            self._groups.append((np.concatenate(parts), places))

    def all(self, users: Vectors) -> npt.NDArray[np.float32]:
        """About the scores, but for roundings: [segments, users]; no vector may be zero."""
        unit, lengths = _unit(users), _lengths(users)
        found = np.empty((len(self._anchors), len(users)), np.float32)
        for start, stop, products, places in self._products(unit):
            for segment, first, last in places:
                scale = self._scale(segment, lengths[start:stop])
                found[segment, start:stop] = products[first:last].max(axis=0) * scale
        return found

    def reaching(self, users: Vectors, floors: Numbers) -> Iterator[tuple[int, Rows, npt.NDArray[np.float32]]]:
        """(segment, rows of `users`, their scores): those whose score is at least the segment's floor.

        No vector may be zero. A segment may come several times, a row of it once.
        """
        unit, lengths = _unit(users), _lengths(users)
        # A product of vectors no longer than 1 is off by at most (width + 2) roundings; the rest covers the scale's.
        margin = np.float32((users.shape[1] + 8) * np.finfo(np.float32).eps)
        for start, stop, products, places in self._products(unit):
            for segment, first, last in places:
                best = products[first:last].max(axis=0) if last - first > 1 else products[first]
                needed = np.maximum(
                    floors[segment] / self._scale(segment, lengths[start:stop]), np.finfo(np.float32).min
                )
                rows = np.flatnonzero(best >= needed - 2 * margin)
                if len(rows):
                    near = products[first:last, rows] >= best[rows] - 2 * margin
                    scores = self._exact(segment, users[start + rows], near)
                    reached = scores >= floors[segment]
                    yield segment, start + rows[reached], scores[reached]

    def _products(self, unit: Vectors) -> Iterator[tuple[int, int, Vectors, list[tuple[int, int, int]]]]:
        """(first user, last + 1, float32 [anchors, users], the segments' places among the anchors)."""
        for stacked, places in self._groups:
            users_at_once = max(64, _PRODUCTS_AT_ONCE // len(stacked))
            for start in range(0, len(unit), users_at_once):
                some = unit[start : start + users_at_once]
                yield start, start + len(some), stacked @ some.T, places

    def _scale(self, segment: int, lengths: Numbers) -> Numbers:
        """What a product of the prepared vectors is multiplied by to be the score, about."""
        if self._anchors[segment].metric == "cosine":
            return np.ones(len(lengths))
        return lengths * self._longest[segment]

    def _exact(self, segment: int, users: Vectors, near: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Each user's highest score with the anchors marked in `near` [anchors, users], at least one for each."""
        rows, places = np.nonzero(near.T)
        vectors, metric = self._anchors[segment]
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            pair = users[rows[some]].astype(np.float64), vectors[places[some]].astype(np.float64)
            scores[some] = _SCORERS[metric](*pair)
        return np.asarray(np.maximum.reduceat(scores, np.searchsorted(rows, np.arange(len(users)))))


def _together(counts: Sequence[int]) -> list[list[int]]:
    """The segments in groups of about _ANCHORS_AT_ONCE anchors: one large product costs less than many small ones."""
    groups: list[list[int]] = []
    room = 0
    for number, count in enumerate(counts):
        if not groups or count > room:
            groups.append([])
            room = _ANCHORS_AT_ONCE
        groups[-1].append(number)
        room -= count
    return groups


def _lengths(vectors: Vectors) -> Numbers:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)))


def _unit(vectors: Vectors) -> Vectors:
    lengths = _lengths(vectors)[:, None]
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def candidates(users: DataFrame, anchors: Mapping[int, Anchors], floors: Mapping[int, float]) -> DataFrame:
    """Every user whose score reaches the segment's floor: segment int, user_id string, score float.

    A zero vector has no direction and reaches none.

    Args:
        users: user_id string, vector array<float>, all of the anchors' length.
        anchors, floors: by the segment's number; a floor of -inf is reached by everybody.
    """
    numbers = np.array(list(anchors), np.int32)
    shared = users.sparkSession.sparkContext.broadcast(list(anchors.values()))
    lowest = np.array([floors[number] for number in anchors])

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = Scorer(shared.value)
        for batch in batches:
            vectors = batch.column(1).flatten().to_numpy().reshape(batch.num_rows, -1)
            there = np.flatnonzero(vectors.any(axis=1))
            found = list(scorer.reaching(vectors[there], lowest))
            if found:
                segments = np.concatenate([np.full(len(rows), numbers[place]) for place, rows, _ in found])
                rows = there[np.concatenate([rows for _, rows, _ in found])]
                scores = np.concatenate([scores for _, _, scores in found])
                ids = batch.column(0).take(pa.array(rows))
                yield pa.RecordBatch.from_arrays(
                    [pa.array(segments), ids, pa.array(scores)], ["segment", "user_id", "score"]
                )

    return users.select("user_id", "vector").mapInArrow(score, "segment int, user_id string, score float")
