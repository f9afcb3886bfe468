"""Blocked top-k against a plain loop over all pairs: ties, uneven blocks, the query itself, hard numbers."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spark_udfs import topk
from spark_udfs.topk import Cells, Metric, Nearest, _compare, _gathered, top_k

Named = dict[str, list[float]]
Neighbours = dict[str, list[tuple[str, float]]]
LeftOut = dict[str, set[str]]
NOTHING: LeftOut = {}


def brute_force(queries: Named, candidates: Named, k: int, metric: Metric, out: LeftOut = NOTHING) -> Neighbours:
    """Every pair, exact sums, sorted by (score as float32 from the highest on, id)."""
    found = {}
    for name, q in queries.items():
        scored = []
        for other, c in candidates.items():
            score = math.fsum(x * y for x, y in zip(q, c, strict=True))
            if metric == "cosine":
                score /= math.sqrt(math.fsum(x * x for x in q)) * math.sqrt(math.fsum(x * x for x in c))
            itself = other == name and metric == "cosine"  # here the dot product is of users with items
            if not itself and other not in out.get(name, set()):
                scored.append((other, float(np.float32(score))))
        found[name] = sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]
    return found


def blocks(vectors: Named, cuts: list[int]) -> list[Named]:
    """The vectors in blocks of the given sizes, each sorted by id, in no order among them."""
    names = sorted(vectors, key=lambda name: name[::-1])
    bounds = sorted({0, len(names), *(cut % (len(names) + 1) for cut in cuts)})
    return [{name: vectors[name] for name in sorted(names[a:b])} for a, b in itertools.pairwise(bounds)]


def run(
    queries: Named, candidates: Named, k: int, metric: Metric, cuts: list[int], out: LeftOut = NOTHING
) -> Neighbours:
    """`_compare` over all pairs of blocks, as Spark streams them; its partial results are one per query block."""

    def packed(block: Named) -> dict[str, object]:
        vectors = np.array(list(block.values()), np.float32).tobytes()
        left_out = [name for query in block for name in sorted(out.get(query, set()))]
        counts = [len(out.get(query, set())) for query in block]
        return {"ids": list(block), "vectors": vectors, "left_out": left_out, "left_out_counts": counts}

    words, counts = pa.list_(pa.string()), pa.list_(pa.int32())
    kind = pa.struct([("ids", words), ("vectors", pa.binary()), ("left_out", words), ("left_out_counts", counts)])
    schema = pa.schema(
        [("query_block", pa.int32()), ("query", kind), ("candidate_block", pa.int32()), ("candidate", kind)]
    )
    batches = [
        pa.RecordBatch.from_pylist(
            [{"query_block": n, "query": packed(q), "candidate_block": m, "candidate": packed(c)}], schema
        )
        for n, q in enumerate(blocks(queries, cuts))
        for m, c in enumerate(blocks(candidates, cuts))
    ]
    found: Neighbours = {name: [] for name in queries}
    for batch in _compare(batches, k, metric, same_kind=metric == "cosine"):
        for row in batch.to_pylist():
            found[row["source_id"]].append((row["neighbour_id"], row["score"]))
    return found


# Small whole numbers: many ties, and exact sums whatever the order.
small = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=2)
names = st.text("abé~0", min_size=1, max_size=3)


@given(
    st.dictionaries(names, small, min_size=1, max_size=9),
    st.dictionaries(names, small, min_size=1, max_size=9),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_dot_products_with_ties_in_uneven_blocks(users: Named, items: Named, k: int, cuts: list[int]) -> None:
    assert run(users, items, k, "dot", cuts) == brute_force(users, items, k, "dot")


@given(
    st.dictionaries(names, small.filter(any), min_size=1, max_size=9),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), max_size=3),
)
def test_cosines_among_the_same_vectors_leave_the_vector_itself_out(users: Named, k: int, cuts: list[int]) -> None:
    assert run(users, users, k, "cosine", cuts) == brute_force(users, users, k, "cosine")


@given(
    st.dictionaries(names, small, min_size=1, max_size=9),
    st.dictionaries(names, small, min_size=1, max_size=9),
    st.dictionaries(names, st.sets(names, max_size=4), max_size=6),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), max_size=3),
)
@example(  # left out in no order
    {name: [1.0, 1.0] for name in "0ab"},
    {name: [1.0, 1.0] for name in "0ab"},
    {"0": {"b"}, "a": {"0"}, "b": {"a"}},
    3,
    [],
)
def test_what_is_left_out_is_not_found(users: Named, items: Named, out: LeftOut, k: int, cuts: list[int]) -> None:
    assert run(users, items, k, "dot", cuts, out) == brute_force(users, items, k, "dot", out)


def test_what_many_queries_leave_out_takes_memory_once() -> None:
    long = "i" * 10_000
    users, items = {f"u{n:03}": [1.0, 2.0] for n in range(500)}, {"i1": [1.0, 1.0], "i2": [1.0, 0.0]}
    tracemalloc.start()
    try:
        found = run(users, items, 2, "dot", [], {user: {long, "i1"} for user in users})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(of == [("i2", 1.0)] for of in found.values())
    assert peak < 5e6  # the text of each pair takes 20 MB as numpy has it


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_many_candidates_in_many_products(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 64 candidates: the k-th score of the ones before decides who is looked at; old finds are dropped."""
    monkeypatch.setattr(topk, "_COLUMNS", 64)
    rng = np.random.default_rng(4)
    queries, candidates = (rng.normal(size=(n, 24)).astype(np.float32) for n in (17, 3000))
    candidates[:2000] *= np.linspace(0.1, 1, 2000, dtype=np.float32)[:, None]  # better and better: all are looked at
    expected = brute_force(
        {f"q{n}": row.astype(float).tolist() for n, row in enumerate(queries)},
        {f"{n:04d}": row.astype(float).tolist() for n, row in enumerate(candidates)},
        10,
        metric,
    )
    rows, columns, scores = top_k(queries, candidates, 10, metric)
    for n in range(17):
        found = [(f"{c:04d}", float(s)) for c, s in zip(columns[rows == n], scores[rows == n], strict=True)]
        assert found == expected[f"q{n}"]


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("seed", range(20))
def test_many_twins(metric: Metric, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few vectors of many names in no order, some left out: ties go to the smaller name, over all blocks."""
    monkeypatch.setattr(topk, "_COLUMNS", 64)
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 9))
    queries, distinct = (rng.integers(-1, 2, size=(n, 4)).astype(np.float32) for n in (13, rng.integers(1, 7)))
    queries[:, 0] = distinct[:, 0] = 1  # none is zero
    candidates = distinct[rng.integers(len(distinct), size=400)]
    names = rng.permutation(400).astype(np.str_)
    is_out = rng.random((13, 400)) < rng.choice([0, 0.02, 0.9, 0.999])

    found = Nearest(queries, k, metric)
    for block in np.array_split(np.arange(400), 3):
        rows, columns = np.nonzero(is_out[:, block])
        found.add(names[block], candidates[block], (rows, columns))
    pairs = list(zip(*(of.tolist() for of in found.best()), strict=True))

    exact = queries.astype(np.float64) @ candidates.astype(np.float64).T
    if metric == "cosine":
        exact /= np.linalg.norm(queries.astype(np.float64), axis=1)[:, None]
        exact /= np.linalg.norm(candidates.astype(np.float64), axis=1)
    scores = np.where(is_out, -np.inf, exact.astype(np.float32))
    expected = []
    for row in range(13):
        best = np.lexsort((names, -scores[row]))[:k]
        expected += [(row, names[c], scores[row, c]) for c in best if not is_out[row, c]]
    assert [(row, name) for row, name, _ in pairs] == [(row, name) for row, name, _ in expected]
    assert [score for *_, score in pairs] == pytest.approx([score for *_, score in expected], rel=1e-6)


def test_a_k_beyond_all_memory_gives_all_candidates() -> None:
    queries, candidates = (np.arange(n, dtype=np.float32).reshape(-1, 1) + 1 for n in (2, 3))
    rows, columns, _ = top_k(queries, candidates, 10**15, "dot")
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 0, 1, 1, 1], [2, 1, 0, 2, 1, 0])
    assert len(top_k(queries, candidates[:0], 10**15, "dot")[0]) == 0


def test_scores_do_not_depend_on_the_block_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 matrix product gives equal candidates unequal scores by their place in the block: ours must not."""
    monkeypatch.setattr(topk, "_PAIRS_AT_ONCE", 102)
    scored = Mock(wraps=topk.pair_scores)
    monkeypatch.setattr(topk, "pair_scores", scored)
    rng = np.random.default_rng(7)
    twins = np.repeat(rng.normal(size=(1, 63)).astype(np.float32), 101, axis=0)
    queries = rng.normal(size=(13, 63)).astype(np.float32)
    _, columns, scores = top_k(queries, twins, 5, "cosine")
    assert columns.reshape(13, 5).tolist() == [[0, 1, 2, 3, 4]] * 13
    assert [len(call.args[2][0]) for call in scored.call_args_list] == [13 * 5]  # not each of the twins
    alone = [top_k(queries[row : row + 1], twins[:1], 1, "cosine")[2][0] for row in range(13)]
    assert scores.reshape(13, 5).tolist() == [[score] * 5 for score in alone]


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_hard_numbers(metric: Metric, scale: float) -> None:
    """Near ties that float32 products confuse, and sizes whose float32 squares overflow or vanish."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=48)
    candidates = np.array([base + 1e-6 * rng.normal(size=48) for _ in range(60)], np.float32) * np.float32(scale)
    queries = np.array([base, -base, rng.normal(size=48)], np.float32) * np.float32(scale)
    named = {f"c{n:02d}": row.astype(float).tolist() for n, row in enumerate(candidates)}
    expected = brute_force({str(n): row.astype(float).tolist() for n, row in enumerate(queries)}, named, 7, metric)
    rows, columns, scores = top_k(queries, candidates, 7, metric)
    for n in range(3):
        found = [(f"c{c:02d}", float(s)) for c, s in zip(columns[rows == n], scores[rows == n], strict=True)]
        assert found == expected[str(n)]


def test_vectors_are_put_into_cells_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_SORTED_AT_ONCE", 10)
    table = pa.table({"id": [f"u{n}" for n in range(27)], "vector": [[float(n), 1.0] for n in range(27)]})
    gathered = list(_gathered(table.to_batches(max_chunksize=4)))
    assert [batch.num_rows for batch in gathered] == [12, 12, 3]
    assert pa.Table.from_batches(gathered).equals(table)
    empty = pa.RecordBatch.from_pylist([], table.schema)
    assert list(_gathered([empty, empty])) == []


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_cell_of_a_candidate_is_that_of_the_nearest_centre(metric: Metric) -> None:
    rng = np.random.default_rng(6)
    centres, vectors = (rng.normal(size=(n, 5)).astype(np.float32) for n in (30, 200))
    if metric == "cosine":
        centres /= np.linalg.norm(centres, axis=1)[:, None]
    compared = vectors / np.linalg.norm(vectors, axis=1)[:, None] if metric == "cosine" else vectors
    distances = np.linalg.norm(compared[:, None] - centres, axis=2)
    cells = Cells(centres, metric, 3)
    best = np.argsort(-(compared @ centres.T), axis=1)[:, :3]
    assert np.sort(cells.of_queries(vectors)).tolist() == np.sort(best).tolist()
    for _ in range(2):
        assert cells.of_candidates(vectors).tolist() == distances.argmin(axis=1).tolist()
