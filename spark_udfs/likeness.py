"""Lookalike and affinity scores: how similar users are to given users or items, many segments in one pass.

A segment is a few anchors; a user's score is the highest cosine, or dot product, of their vector with any of them.
`anchors_of` makes the anchors of a seed list. `candidates` scores all users for all segments by matrix products, and
yields those that reach their segment's floor; it holds one batch in memory, however many users or members there are.
Scores are bit for bit those of vector_cosine_similarity or vector_inner_product. As in spark_udfs.topk, a float32
product rounds differently for different shapes, so it only preselects the pairs that may reach the floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from spark_udfs.arrow import matrix_of
from spark_udfs.topk import Metric, pair_scores, polar, unit_vectors
from spark_udfs.vectors import norm
from training.arrays import Float32, Float64, Int64
from training.ragged import ranges

Method = Literal["nearest_seed", "tastes", "classifier"]
DEFAULT_METHOD: Method = "classifier"  # finds the most held-out redeemers: scripts/bench/lookalike.py

_ANCHORS_AT_ONCE = 1024  # of several segments, in one product
_PRODUCTS_AT_ONCE = 1 << 20  # 4 MB: stays in the CPU cache
_RIDGE = 1 / 3  # the classifier's L2 penalty, times coordinates per seed: scripts/bench/lookalike.py, decision 13


class Anchors(NamedTuple):
    """What a segment's users are compared with, float32 [anchors, width], none zero; and by which metric."""

    vectors: Float32
    metric: Metric


# ---- anchors of a seed list ---------------------------------------------------------------------------------------


def anchors_of(method: Method, seeds: Float32, others: Float32, tastes: int) -> Anchors:
    """The anchors of a seed list. Deterministic for the same seeds in the same order.

    Args:
        seeds, others: [n, width], none zero; `others` is a sample of the users who are not seeds.
        tastes: the number of centres for the method of that name.
    """
    if method == "nearest_seed":
        return Anchors(np.unique(seeds, axis=0), "cosine")
    if method == "tastes":
        return Anchors(_centres(unit_vectors(seeds), tastes), "cosine")
    return Anchors(np.asarray(direction_of(unit_vectors(seeds), unit_vectors(others))[None], np.float32), "cosine")


def _centres(unit: Float32, count: int) -> Float32:
    """At most `count` k-means centres, without zero ones (of vectors that cancel out), which have no direction."""
    from scipy.cluster.vq import kmeans2  # noqa: PLC0415 - only the driver needs it

    distinct = np.unique(unit, axis=0)
    if len(distinct) <= count:
        return np.asarray(distinct, np.float32)
    centres, labels = kmeans2(unit.astype(np.float64), count, iter=50, minit="++", missing="warn", seed=0)
    used = np.asarray(centres[np.unique(labels)], np.float32)
    used = used[used.any(axis=1)]
    return used if len(used) else np.asarray(distinct[:count], np.float32)


def direction_of(seeds: Float64 | Float32, others: Float64 | Float32) -> Float64:
    """The weights of a logistic regression of seeds against others, [width]; both classes weigh the same in total.

    Coordinates are standardised and penalised (L2), the more the fewer seeds there are for each. A coordinate whose
    mean differs between the classes by more than chance is penalised less, in proportion: a generalised ridge whose
    prior variances are estimated from the data (empirical Bayes). So a single number that tells seeds from others
    counts beside hundreds that do not.
    """
    from scipy.optimize import minimize  # noqa: PLC0415

    if not len(others):  # nothing to separate the seeds from
        return np.asarray(seeds.mean(axis=0, dtype=np.float64))
    rows = np.concatenate([seeds, others]).astype(np.float64)
    spread = rows.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    difference = (rows[: len(seeds)].mean(axis=0) - rows[len(seeds) :].mean(axis=0)) / scale
    beyond_chance = np.maximum(difference**2 - 1 / len(seeds) - 1 / len(others), 0)
    scale /= np.sqrt(1 + beyond_chance / (beyond_chance.mean() or 1))  # larger coordinates need smaller weights
    standard = (rows - rows.mean(axis=0)) / scale
    ridge = _RIDGE * rows.shape[1] / len(seeds)
    sign = np.concatenate([np.ones(len(seeds)), -np.ones(len(others))])
    weight = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (seeds, others)])

    def loss(point: Float64) -> tuple[float, Float64]:
        margin = sign * (standard @ point[1:] + point[0])
        slope = -weight * sign * np.exp(-np.logaddexp(0, margin))
        gradient = np.concatenate([[slope.sum()], standard.T @ slope + ridge * point[1:]])
        return float(weight @ np.logaddexp(0, -margin) + ridge / 2 * point[1:] @ point[1:]), gradient

    direction = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B").x[1:] / scale
    # Others identical to the seeds separate nothing either: fall back to the seeds' mean.
    return np.asarray(direction if direction.any() else rows[: len(seeds)].mean(axis=0))


# ---- scores -------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Segments of one metric whose anchors share one product.

    Attributes:
        segments: their numbers, [segments].
        first, counts: where each segment's anchors start, and how many it has, [segments].
        vectors: the anchors, concatenated by segment, float64 [anchors, width].
        lengths: the anchors' norms, [anchors].
        prepared: the anchors for the float32 product, [anchors, width]: unit vectors under "cosine", divided by the
            segment's largest norm under "dot". No norm exceeds 1, as the rounding-error bound requires, and nothing
            overflows.
        divided_by: what each segment's anchors were divided by under "dot", ones under "cosine", [segments].
    """

    metric: Metric
    segments: Int64
    first: Int64
    counts: Int64
    vectors: Float64
    lengths: Float64
    prepared: Float32
    divided_by: Float64

    def scale(self, lengths: Float64) -> Float64:
        """The factor from a product with a user's unit vector to a score, up to rounding: [segments, users or 1]."""
        return self.divided_by[:, None] * (lengths if self.metric == "dot" else 1.0)

    def products(self, unit: Float32) -> Iterator[tuple[slice, Float32, Float32]]:
        """In blocks of users: which users, their products [anchors, users], and each segment's maximum [segments,
        users]."""
        users_at_once = max(64, _PRODUCTS_AT_ONCE // len(self.prepared))
        for start in range(0, len(unit), users_at_once):
            some = slice(start, min(start + users_at_once, len(unit)))
            products = self.prepared @ unit[some].T
            yield some, products, self._best(products)

    def _best(self, products: Float32) -> Float32:
        if len(products) == len(self.segments):
            return products
        ranges = zip(self.first, self.first + self.counts, strict=True)
        return np.stack([products[start:end].max(axis=0) for start, end in ranges])  # reduceat is five times as slow

    def exact(self, users: Float64, lengths: Float64, rows: Int64, anchors: Int64) -> Float32:
        """The score of each pair of a user (a row of `users`) and an anchor."""
        both = (lengths, self.lengths) if self.metric == "cosine" else None
        return pair_scores(users, self.vectors, (rows, anchors), both)


class Scorer:
    """The scores of many segments."""

    def __init__(self, anchors: Sequence[Anchors]) -> None:
        self._count = len(anchors)
        self._groups: list[_Group] = []
        for metric in ("cosine", "dot"):
            segments = [number for number, of in enumerate(anchors) if of.metric == metric]
            self._groups += [_group(metric, some, anchors) for some in _together(segments, anchors)]

    def approximate(self, users: Float32) -> Float32:
        """The scores up to rounding, [segments, users]; no vector may be zero."""
        _, lengths, unit = polar(users)
        scores = np.empty((self._count, len(users)), np.float32)
        for group in self._groups:
            for some, _, best in group.products(unit):
                scores[group.segments, some] = best * group.scale(lengths[some])
        return scores

    def reaching(self, users: Float32, floors: Float64) -> Iterator[tuple[Int64, Int64, Float32]]:
        """The users who score at least a segment's floor: segments, rows of `users`, scores. Each pair comes once.

        No vector may be zero.
        """
        exact, lengths, unit = polar(users)
        # A product of vectors of norm at most 1 is off by at most (width + 2) roundings; the rest of the margin covers
        # those of the scale and of the floor.
        margin = np.float32(2 * (users.shape[1] + 8) * np.finfo(np.float32).eps)
        for group in self._groups:
            lowest = floors[group.segments]
            for some, products, best in group.products(unit):
                # Products lie within ±1, so clipping to ±2 keeps a floor that nobody, or everybody, reaches.
                needed = np.clip(lowest[:, None] / group.scale(lengths[some]) - margin, -2, 2).astype(np.float32)
                place, row = np.divmod(np.flatnonzero(best >= needed), best.shape[1])
                if not len(row):
                    continue
                pair = np.repeat(np.arange(len(row)), group.counts[place])
                _, anchor = ranges(group.first[place], group.first[place] + group.counts[place])
                near = products[anchor, row[pair]] >= best[place, row][pair] - margin
                pair, anchor, row = pair[near], anchor[near], row + some.start
                scores = group.exact(exact, lengths, row[pair], anchor)
                scores = np.asarray(np.maximum.reduceat(scores, np.searchsorted(pair, np.arange(len(row)))))
                reached = scores >= lowest[place]
                yield group.segments[place[reached]], row[reached], scores[reached]


def _group(metric: Metric, segments: list[int], anchors: Sequence[Anchors]) -> _Group:
    vectors = [anchors[number].vectors.astype(np.float64) for number in segments]
    lengths = [norm(of) for of in vectors]
    if metric == "cosine":
        prepared = [of / length[:, None] for of, length in zip(vectors, lengths, strict=True)]
        divided_by = np.ones(len(segments))
    else:
        divided_by = np.array([length.max() or 1.0 for length in lengths])
        prepared = [of / by for of, by in zip(vectors, divided_by, strict=True)]
    counts = np.array([len(of) for of in vectors])
    return _Group(
        metric,
        np.array(segments),
        np.cumsum(counts) - counts,
        counts,
        np.concatenate(vectors),
        np.concatenate(lengths),
        np.concatenate(prepared).astype(np.float32),
        divided_by,
    )


def _together(segments: Iterable[int], anchors: Sequence[Anchors]) -> list[list[int]]:
    """The segments in groups of about _ANCHORS_AT_ONCE anchors: one large product costs less than many small ones."""
    groups: list[list[int]] = []
    room = 0
    for number in segments:
        count = len(anchors[number].vectors)
        if not groups or count > room:
            groups.append([])
            room = _ANCHORS_AT_ONCE
        groups[-1].append(number)
        room -= count
    return groups


def candidates(users: DataFrame, anchors: Mapping[int, Anchors], floors: Mapping[int, float]) -> DataFrame:
    """Every user whose score reaches the segment's floor: segment int, user_id string, score float.

    A zero vector has no direction and reaches no floor.

    Args:
        users: user_id string, vector array<float>, of the anchors' width.
        anchors, floors: by the segment's number; a floor of -inf is reached by everybody.
    """
    numbers = np.array(list(anchors), np.int32)
    shared = users.sparkSession.sparkContext.broadcast(list(anchors.values()))
    lowest = np.array([floors[number] for number in anchors])

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorer = Scorer(shared.value)
        for batch in batches:
            vectors = matrix_of(batch.column(1))
            nonzero = np.flatnonzero(vectors.any(axis=1))
            for places, rows, scores in scorer.reaching(vectors[nonzero], lowest):
                ids = batch.column(0).take(pa.array(nonzero[rows]))
                yield pa.RecordBatch.from_arrays(
                    [pa.array(numbers[places]), ids, pa.array(scores)], ["segment", "user_id", "score"]
                )

    return users.select("user_id", "vector").mapInArrow(score, "segment int, user_id string, score float")
