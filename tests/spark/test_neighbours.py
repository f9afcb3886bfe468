"""The neighbours table, as read by DuckDB, against all pairs in plain numpy; blocks have three vectors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deltalake
import duckdb
import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import find_neighbours
from jobs.errors import TrailvecError
from jobs.files import write_json
from jobs.find_neighbours import STAGE
from jobs.runtime import Runtime
from jobs.spark_session import drawn_by_hash, spark_conf
from jobs.tables import CONTEXT_VALUES, CURRENT_MODEL, ITEM_EMBEDDINGS, ITEMS, SESSIONS, USER_EMBEDDINGS
from jobs.user_lists import read_items
from spark_udfs import topk
from spark_udfs.topk import BLOCK_CONF, nearest
from tests.conftest import make_config, put

K = 4
Vectors = dict[str, list[float]]


def embed(runtime: Runtime, spark: SparkSession, users: Vectors, items: Vectors, version: str = "m1") -> None:
    """Writes a model's folder and its two tables, and makes it the current model."""
    (runtime.models / version).mkdir(parents=True, exist_ok=True)
    write_json(runtime.models / version / "model.json", {})
    write_json(runtime.models / "current.json", {"model_version": version})
    put_users(runtime, users, version)
    put(runtime, CURRENT_MODEL, spark.createDataFrame([(version,)], CURRENT_MODEL.schema()))
    put_item_vectors(runtime, items, version)
    put(runtime, ITEMS, spark.createDataFrame([about(item, n) for n, item in enumerate(items, 2)], ITEMS.schema()))
    put(runtime, SESSIONS, spark.createDataFrame([session(*what) for what in DONE], SESSIONS.schema()))
    types = [("event_type", name, number) for number, name in enumerate(("purchase", "search", "view"), 2)]
    put(runtime, CONTEXT_VALUES, spark.createDataFrame(types, CONTEXT_VALUES.schema()))


def put_users(runtime: Runtime, users: Vectors, version: str = "m1", cold: Collection[str] = ()) -> None:
    rows = user_rows(users, version, cold)
    put(runtime, USER_EMBEDDINGS, runtime.spark.createDataFrame(rows, USER_EMBEDDINGS.schema()))


def put_item_vectors(runtime: Runtime, items: Vectors, version: str = "m1") -> None:
    rows = item_rows(items, version)
    put(runtime, ITEM_EMBEDDINGS, runtime.spark.createDataFrame(rows, ITEM_EMBEDDINGS.schema()))


def user_rows(users: Vectors, version: str, cold: Collection[str] = ()) -> list[tuple[Any, ...]]:
    return [(user, version, AS_OF, 1, user in cold, vector) for user, vector in users.items()]


def item_rows(items: Vectors, version: str) -> list[tuple[Any, ...]]:
    return [(item, n, version, AS_OF, False, vector) for n, (item, vector) in enumerate(items.items(), 2)]


AS_OF = datetime(2017, 12, 1, tzinfo=timezone.utc)
WHEN = datetime(2017, 11, 1, tzinfo=timezone.utc)
# (user, item, what they did)
DONE = [("u1", "i1", "purchase"), ("u1", "i2", "view"), ("u1", "i4", "purchase"), ("u2", "i1", "purchase")]


def about(item: str, number: int) -> dict[str, object]:
    counts = {name: 1 for name in ("event_count", "train_count", "target_count")}
    texts = {"item_name": None, "category": None, "vertical": "food" if int(item[1:]) % 2 else "rides"}
    return {
        "item_index": number,
        "item_id": item,
        "unit_price": None,
        "first_ts": WHEN,
        "said_ts": (None,) * 4,
        **texts,
        **counts,
    }


def session(user: str, item: str, event_type: str, when: datetime = WHEN) -> dict[str, object]:
    event = {"event_ts": when, "event_id": f"{user}{item}", "item_id": item, "event_type": event_type}
    event |= {"vertical": "food", "amount": None, "quantity": None, "time_zone": "UTC"}
    times = {"start_ts": when, "end_ts": when, "run_start_ts": when}
    whole = {"user_id": user, "event_count": 1, "verticals": ["food"], "amount": None, "events": [event]}
    return {"session_id": f"{user}{item}{when}", **times, **whole}


def some(prefix: str, count: int, seed: int) -> Vectors:
    """Vectors of small integers: many ties, some zero vectors."""
    values = np.random.default_rng(seed).integers(-1, 2, size=(count, 3))
    return {f"{prefix}{n}": row.astype(float).tolist() for n, row in enumerate(values)}


USERS, ITEMS_OF_USERS = some("u", 20, 1), some("i", 11, 2) | {"i9": [0.0, 0.0, 0.0]}


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with the vectors of USERS and of their items; each test takes a copy."""
    root = tmp_path_factory.mktemp("filled")
    embed(Runtime(make_config(root), spark), spark, USERS, ITEMS_OF_USERS)
    return root


@pytest.fixture
def root(filled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filled, tmp_path / "warehouse")


def brute_force(
    sources: Vectors,
    targets: Vectors,
    cosine: bool,
    without: set[tuple[str, str]] = frozenset(),
    same_kind: bool | None = None,
) -> dict[tuple[str, int], tuple[str, float]]:
    found = {}
    for source, a in sources.items():
        scored = []
        for target, b in targets.items():
            score = np.dot(a, b)
            if cosine:
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                if not lengths:
                    continue
                score /= lengths
            # By default dot products pair users with items: equal ids do not matter.
            itself = source == target and (cosine if same_kind is None else same_kind)
            if not itself and (source, target) not in without:
                scored.append((-np.float32(score), target))
        for rank, (score, target) in enumerate(sorted(scored)[:K], 1):
            found[source, rank] = target, -float(score)
    return found


def read(runtime: Runtime) -> dict[str, dict[tuple[str, int], tuple[str, float]]]:
    """(source, rank) → (neighbour, score) by kind, as read by DuckDB."""
    files = deltalake.DeltaTable(str(runtime.root / "tables" / "neighbours")).file_uris()
    rows = duckdb.sql(
        "SELECT kind, source_id, rank, neighbour_id, score, model_version "
        "FROM read_parquet($files, hive_partitioning=true)",
        params={"files": files},
    ).fetchall()
    assert {row[5] for row in rows} == {"m1"}
    found: dict[str, dict[tuple[str, int], tuple[str, float]]] = {}
    for kind, source, rank, target, score, _ in rows:
        found.setdefault(kind, {})[source, rank] = target, score
    assert sum(map(len, found.values())) == len(rows)
    return found


def test_all_three_kinds_against_brute_force(
    make_runtime: Callable[..., Runtime], root: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime(f"neighbours.k={K}", "neighbours.block_rows=3", root=root)
    monkeypatch.setattr(find_neighbours, "copies", Mock(side_effect=AssertionError("no list is to be copied")))
    users, items = some("1", 20, 1), some("1", 11, 2)  # numeric ids: user 14 is not item 14
    assert [0.0, 0.0, 0.0] in users.values()
    of_old = [9.0, 9.0, 9.0]  # another model's: never used
    both = user_rows(users, "m1") + user_rows({"u0": of_old}, "old")
    put(runtime, USER_EMBEDDINGS, spark.createDataFrame(both, USER_EMBEDDINGS.schema()))
    both = item_rows(items, "m1") + item_rows({"i0": of_old}, "old")
    put(runtime, ITEM_EMBEDDINGS, spark.createDataFrame(both, ITEM_EMBEDDINGS.schema()))
    runtime.execute(STAGE)
    assert read(runtime) == {
        "user_item": brute_force(users, items, False),
        "user_user": brute_force(users, users, True),
        "item_item": brute_force(items, items, True),
    }
    assert runtime.execute(STAGE).skipped
    same = (f"neighbours.k={K}", "neighbours.block_rows=3")
    unread = ("habit.weight=20.0", "sequences.seen_days=7", 'sequences.target_event_types=["purchase"]')
    assert make_runtime(*same, *unread, root=root).execute(STAGE).skipped

    turned = 'neighbours.metrics={user_item="cosine", item_item="dot"}'
    other = Runtime(make_config(runtime.root, f"neighbours.k={K}", turned), spark)
    other.execute(STAGE)
    assert read(other) == {
        "user_item": brute_force(users, items, True, same_kind=False),
        "user_user": brute_force(users, users, True),
        "item_item": brute_force(items, items, False, same_kind=True),
    }

    fewer = Runtime(make_config(runtime.root, f"neighbours.k={K}", 'neighbours.kinds=["item_item"]'), spark)
    assert fewer.execute(STAGE).notes == [
        f"the rows of kind {kind} from an earlier run are removed, as neighbours.kinds does not name it"
        for kind in ("user_item", "user_user")
    ]
    assert read(fewer) == {"item_item": brute_force(items, items, True)}


def test_items_in_stock_of_a_vertical_that_a_user_has_not_bought(
    make_runtime: Callable[..., Runtime], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tmp_path / "stock.txt"
    stock.write_text("\ufeffitem_id\ni1\ni3 \t\n\ni5\ni2\ni9\nunknown\n", encoding="utf-8")
    filters = (
        'neighbours.verticals=["food", "foot"]',
        f'neighbours.in_stock="{stock}"',
        'neighbours.without=["purchase", "veiw"]',
    )
    runtime = make_runtime(f"neighbours.k={K}", "neighbours.block_rows=3", *filters, root=root)
    listed = read_items(runtime, stock, tmp_path).collect()
    assert [row["item_id"] for row in listed] == ["i1", "i3", "i5", "i2", "i9", "unknown"]
    users, items = USERS, ITEMS_OF_USERS
    assert runtime.execute(STAGE).notes == [
        "neighbours.without leaves nothing out for veiw: no event has that type (found purchase, search, view)",
        "neighbours.verticals offers no item for foot: no item is in that vertical (found food, rides)",
    ]
    offered = {item: items[item] for item in ("i1", "i3", "i5", "i9")}
    bought = {(user, item) for user, item, what in DONE if what == "purchase"}
    found = read(runtime)
    assert found == {
        "user_item": brute_force(users, offered, False, bought),
        "user_user": brute_force(users, users, True),
        "item_item": brute_force(items, offered, True),
    }
    assert found["user_item"] != brute_force(users, offered, False)
    assert runtime.execute(STAGE).skipped
    stock.write_text("i9\n")
    search = Mock(wraps=nearest)
    monkeypatch.setattr(find_neighbours, "nearest", search)
    assert not runtime.execute(STAGE).skipped
    assert read(runtime).keys() == {"user_item", "user_user"}  # a zero vector: nothing is near it
    assert [call.args[2] for call in search.call_args_list] == [1, K, 1]  # no memory for more neighbours than exist
    stock.write_text("i2\n")
    with pytest.raises(TrailvecError, match="no item is left as a neighbour: correct neighbours"):
        runtime.execute(STAGE)
    stock.write_text('i1\n"i3"\n')
    with pytest.raises(TrailvecError, match=r"a line of the list .*stock\.txt is quoted or ends in a delimiter"):
        runtime.execute(STAGE)
    stock.write_text("café\ni1\n", encoding="latin-1")
    with pytest.raises(TrailvecError, match=r"the list .*stock\.txt is not UTF-8 text: save it as UTF-8"):
        runtime.execute(STAGE)
    for write, name in ((pd.DataFrame.to_parquet, "stock.parquet"), (pd.DataFrame.to_csv, "stock.csv")):
        folder = tmp_path / name
        folder.mkdir()
        for number, part in enumerate((["i1", "i3"], ["i5", "i9"])):
            write(pd.DataFrame({"item_id": part, "price": 1}), folder / f"{number}{folder.suffix}", index=False)
        listed = read_items(runtime, find_neighbours._stock_list(str(folder)), tmp_path).collect()
        assert {row["item_id"] for row in listed} == {"i1", "i3", "i5", "i9"}
    with pytest.raises(TrailvecError, match=r"the list .* is a folder: name a file, or a folder of Parquet or CSV"):
        read_items(runtime, tmp_path, tmp_path)
    stock.unlink()
    with pytest.raises(TrailvecError, match=r"neighbours\.in_stock: .*stock\.txt does not exist: correct the path"):
        runtime.execute(STAGE)


def test_habits_lift_what_a_user_does_again_and_again(
    make_runtime: Callable[..., Runtime], root: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (f"neighbours.k={K}", 'neighbours.kinds=["user_item", "item_item"]')
    settings = (*kinds, "neighbours.habit=true", "habit.weight=20.0", "habit.decay=1.0")
    runtime = make_runtime(*settings, 'sequences.target_event_types=["purchase"]', root=root)
    users, items = USERS, ITEMS_OF_USERS
    end = datetime(2017, 12, 1, tzinfo=timezone.utc)
    # (user, item, weeks before the log's end): u1 takes i5 every week and i6 once, long ago; an item without a vector;
    # a view
    done = [("u1", "i5", n) for n in (0.0, 1.0, 2.0)] + [("u1", "i6", 50.0), ("u2", "i1", 4.0), ("u2", "gone", 0.0)]
    events = [session(user, item, "purchase", end - timedelta(weeks=weeks)) for user, item, weeks in done]
    put(runtime, SESSIONS, spark.createDataFrame([*events, session("u3", "i7", "view", end)], SESSIONS.schema()))
    with monkeypatch.context() as patch:  # a kill between the commits
        patch.setattr(find_neighbours, "with_habit", Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            runtime.execute(STAGE)
    assert not runtime.execute(STAGE).skipped

    active: dict[tuple[str, str], float] = {}
    for user, item, weeks in done:
        active[user, item] = active.get((user, item), 0) + 1 / max(1, weeks)
    habits = {pair: 20.0 * math.log(1 + activation) for pair, activation in active.items()}
    expected = {}
    for user, a in users.items():
        scored = [(-np.dot(a, b) - habits.get((user, item), 0), item) for item, b in items.items()]
        for rank, (score, item) in enumerate(sorted(scored)[:K], 1):
            expected[user, rank] = item, pytest.approx(-score, abs=1e-5)
    found = read(runtime)
    assert found["user_item_habit"] == expected
    assert found["user_item"] == brute_force(users, items, False)  # as without habits
    assert _names(found["user_item_habit"]) != _names(found["user_item"])
    assert expected["u1", 1][0] == "i5"

    none = spark.createDataFrame([], "source_id string, neighbour_id string, score double")
    plan = find_neighbours.with_habit(none, none, K)._jdf.queryExecution().executedPlan().toString()
    assert plan.count("Exchange ") == 1

    assert runtime.execute(STAGE).skipped
    targets, idle = 'sequences.target_event_types=["purchase"]', replace(STAGE, run=lambda running: None)
    for changed, skipped in (
        ("sequences.seen_days=7", True),
        ("habit.weight=21.0", False),
        ("sequences.target_event_types=[]", False),
    ):
        assert make_runtime(*settings, targets, changed, root=root).execute(idle).skipped == skipped, changed

    without = Runtime(make_config(runtime.root, *settings, 'neighbours.without=["purchase"]'), spark)
    without.execute(STAGE)
    assert read(without)["user_item_habit"].keys() == expected.keys()
    assert "i5" not in {item for (user, _), (item, _) in read(without)["user_item_habit"].items() if user == "u1"}

    off = Runtime(make_config(runtime.root, *kinds), spark)
    off.execute(STAGE)
    assert read(off) == {kind: of for kind, of in found.items() if kind != "user_item_habit"}
    assert off.execute(STAGE).skipped


def test_an_inverted_file_finds_what_lies_in_the_cells_that_it_looks_into(
    make_runtime: Callable[..., Runtime], root: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    users, items = (
        {f"{p}{n}": v.tolist() for n, v in enumerate(rng.normal(size=(n, 4)).astype(np.float32))}
        for p, n in (("u", 90), ("i", 120))
    )
    exact = {
        "user_item": brute_force(users, items, False),
        "user_user": brute_force(users, users, True),
        "item_item": brute_force(items, items, True),
    }
    sets = (f"neighbours.k={K}", "neighbours.block_rows=8", "neighbours.cells=6")
    runtime = make_runtime(*sets, "neighbours.probes=6", root=root)  # all cells, so the search is exact
    put_users(runtime, users)
    put_item_vectors(runtime, items)
    with monkeypatch.context() as patch:
        searches = Mock(side_effect=nearest)
        patch.setattr(find_neighbours, "nearest", searches)
        patch.setattr(find_neighbours, "ASKED", 30)
        assert runtime.execute(STAGE).notes == [f"{SHARE}item_item 1.000, user_item 1.000, user_user 1.000"]
    counts = [call.kwargs["counts"] for call in searches.call_args_list]
    assert counts[3:] == [(30, 120), (30, 90), (30, 120)]  # for the exact search, those of the sample
    assert {kind: _names(of) for kind, of in read(runtime).items()} == {k: _names(of) for k, of in exact.items()}

    report = Runtime(make_config(runtime.root, *sets, "neighbours.probes=2"), spark).execute(STAGE)
    found = read(runtime)
    shares = {}
    for kind, true in exact.items():
        true_pairs, pairs = ({(s, t) for (s, _), t in _names(of).items()} for of in (true, found[kind]))
        shares[kind] = len(true_pairs & pairs) / len(true_pairs)
        assert 0.5 < shares[kind] < 1
    assert report.notes == [SHARE + ", ".join(f"{kind} {share:.3f}" for kind, share in sorted(shares.items()))]
    cold = spark.createDataFrame([("i1", [0.0, 0.0])], "id string, vector array<float>")
    drawn = Mock(side_effect=drawn_by_hash)
    monkeypatch.setattr(find_neighbours, "drawn_by_hash", drawn)
    assert find_neighbours._cells(cold, 1, "dot", runtime.config.neighbours) is None
    many = runtime.config.neighbours.model_copy(update={"cells": 89_443})  # 5.7 million vectors would be too many
    for cells, count, expected in ((many, 500_000_000, 1_000_000), (runtime.config.neighbours, 1_000, 6 * 64)):
        find_neighbours._cells(cold, count, "dot", cells)
        assert drawn.call_args.args[0] * count == pytest.approx(expected)


SHARE = "share of the exact neighbours found, for a sample of queries: "


def _names(of: dict[tuple[str, int], tuple[str, float]]) -> dict[tuple[str, int], str]:
    return {key: name for key, (name, _) in of.items()}


def test_partitions_and_blocks_do_not_matter(spark: SparkSession) -> None:
    """Vectors with awkward fractions, nine of them identical: a plain float32 matrix product would score identical ones
    differently by position.
    """
    rng = np.random.default_rng(5)
    values = {f"u{n:02d}": rng.normal(size=33).tolist() for n in range(40)}
    values |= {f"twin{n}": values["u07"] for n in range(9)}
    frame = spark.createDataFrame(list(values.items()), "id string, vector array<float>")
    found = []
    for block_rows, partitions, tasks in ((7, 3, 4), (4096, 1, 1)):
        with spark_conf(spark, BLOCK_CONF):
            users = frame.repartition(partitions)
            answer = nearest(
                users, users, 5, "cosine", same_kind=True, block_rows=block_rows, counts=(49, 49), tasks=tasks
            )
            found.append(sorted(answer.collect()))
    assert found[0] == found[1]
    assert len(found[0]) == 5 * 49
    assert [row["neighbour_id"] for row in found[0] if row["source_id"] == "u07"] == [f"twin{n}" for n in range(5)]


def test_blocks_lie_in_many_tasks_however_few_bytes_and_are_small_however_full_a_cell(spark: SparkSession) -> None:
    users = spark.createDataFrame([(f"u{n:02d}", [float(n)]) for n in range(60)], "id string, vector array<float>")
    rows = users.withColumn("left_out", F.array().cast("array<string>"))
    with spark_conf(spark, BLOCK_CONF):
        pairs = topk._all_pairs(rows, rows, (9, 8), tasks=4).select(
            F.spark_partition_id(), "query_block", "candidate_block"
        )
        task_of_pair = {(query, candidate): task for task, query, candidate in pairs.collect()}
    assert sorted(task_of_pair) == [(query, candidate) for query in range(9) for candidate in range(8)]
    assert len(set(task_of_pair.values())) > 2
    # No block of queries starts over in its task.
    runs = [place for place, _ in groupby((task, query) for (query, _), task in task_of_pair.items())]
    assert len(runs) == len(set(runs))

    # Cell 1 has 40 of the 60 users, many times the mean: its blocks are no larger, and no block number is used twice.
    cell = F.greatest(F.lit(1), F.col("vector")[0] - 38).cast("int")
    in_cells = topk._blocks(topk._numbered_in_cells(rows.withColumn("cell", cell), 7), "query")
    found = in_cells.select("cell", "query_block", "query.ids").collect()
    sizes = {place: [len(row["ids"]) for row in found if row["cell"] == place] for place in (1, 2, 21)}
    assert {place: sorted(of) for place, of in sizes.items()} == {1: [5, 7, 7, 7, 7, 7], 2: [1], 21: [1]}
    assert len({row["query_block"] for row in found}) == len(found) == 26
    assert sorted(name for row in found for name in row["ids"]) == [f"u{n:02d}" for n in range(60)]


def test_a_model_without_vectors(make_runtime: Callable[..., Runtime], root: Path, spark: SparkSession) -> None:
    runtime = make_runtime(root=root)
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("new",)], CURRENT_MODEL.schema()))
    with pytest.raises(TrailvecError, match="user_embeddings has no vector of model new: run `trailvec score_users`"):
        runtime.execute(STAGE)
    put(runtime, CURRENT_MODEL, spark.createDataFrame([], CURRENT_MODEL.schema()))
    with pytest.raises(TrailvecError, match="no model has a vector for every user yet: run `trailvec score_users`"):
        runtime.execute(STAGE)
