import math
import subprocess
import sys
import threading
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.tables import SEQUENCES
from tests.sequence_files import MAX_LENGTH, damage, make_rows, write_files
from training import data
from training.batches import FEATURES, OF_PLACE, TARGET, pad
from training.config import CONTEXT_FEATURES
from training.data import Batch, Held, choose_targets, padding, read_batches, read_held, rows_digest, shuffle_moments


def test_a_feature_is_named_alike_in_the_table_in_a_batch_and_in_the_settings() -> None:
    assert tuple(c.name for c in SEQUENCES.columns if c.type == "array<int>" and not c.nullable) == FEATURES
    assert FEATURES[1:] == CONTEXT_FEATURES


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=6), st.integers(1, 4))
def test_pad_equals_plain_python(rows: list[list[int]], width: int) -> None:
    lengths = np.array([len(row) for row in rows], int)
    values = np.array([value for row in rows for value in row], np.int32)
    expected = [row[-width:] + [0] * (width - len(row)) for row in rows]
    assert pad(values, lengths, width).tolist() == expected


def read(files: list[str], rank: int = 0, size: int = 1, **changed: Any) -> list[Batch]:
    settings = {"max_length": MAX_LENGTH, "batch_size": 4, "seed": 5, **changed}
    return list(read_batches(files, rank=rank, size=size, **settings))


def as_rows(batches: list[Batch]) -> list[tuple[tuple[int, ...], ...]]:
    """Each row as a tuple of its lists, without the padding."""
    rows = []
    for batch in batches:
        for number in range(len(batch["item_index"])):
            length = int((batch["item_index"][number] > 0).sum())
            assert all(not batch[name][number, length:].any() for name in FEATURES)
            rows.append(tuple(tuple(batch[name][number, :length].tolist()) for name in FEATURES))
    return rows


def as_tuples(rows: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tuple(row[name]) for name in FEATURES) for row in rows]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(some, others, strict=True)
    )


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_ranks_read_different_rows_and_together_all_of_them_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], row_group_size: int, ranks: int, seed: int
) -> None:
    parts = [make_rows(size, number) for number, size in enumerate(sizes)]
    files = write_files(tmp_path_factory.mktemp("parts"), *parts, row_group_size=row_group_size)
    batches = [read(files, rank, ranks, seed=seed) for rank in range(ranks)]
    found = [as_rows(of_rank) for of_rank in batches]
    assert sorted(row for rows in found for row in rows) == sorted(as_tuples([row for part in parts for row in part]))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert max(map(len, batches)) == math.ceil(max(map(len, found)) / 4)


def test_a_digest_of_rows_is_that_of_their_order_and_row_groups(tmp_path: Path) -> None:
    rows = make_rows(40)

    def digest(name: str, rows: list[dict[str, Any]], row_group_size: int = 20) -> str:
        (tmp_path / name).mkdir()
        return rows_digest(write_files(tmp_path / name, rows, row_group_size=row_group_size))

    digests = [digest("one", rows), digest("reversed", rows[::-1]), digest("regrouped", rows, 10)]
    assert len(set(digests)) == 3
    assert digest("again", rows) == digests[0]


def test_one_row_group_is_split_between_ranks(tmp_path: Path) -> None:
    rows = make_rows(10)
    files = write_files(tmp_path, rows)
    batches = [read(files, rank, 3, batch_size=3) for rank in range(3)]
    found = [as_rows(of_rank) for of_rank in batches]
    assert sorted(map(len, found)) == [3, 3, 4]
    assert sorted(map(len, batches)) == [1, 1, 2]
    assert sorted(row for part in found for row in part) == sorted(as_tuples(rows))


def test_batches_are_full_and_cut_to_their_longest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(23)
    files = write_files(tmp_path, rows[:2], rows[2:])
    monkeypatch.setattr(data, "CHUNK_ROWS", 8)
    batches = read(files)
    assert sorted(len(batch["item_index"]) for batch in batches) == [3, 4, 4, 4, 4, 4]
    for batch in batches:
        assert {tuple(values.shape) for values in batch.values()} == {tuple(batch["item_index"].shape)}
        assert {values.dtype for values in batch.values()} == {torch.int64}
        assert batch["item_index"][:, -1].any()
        following = torch.nn.functional.pad(batch["item_index"][:, 1:], (0, 1))
        assert torch.equal(batch[TARGET], following)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[int]]:
    """Files of rows of very unequal length, and the lengths."""
    lengths = np.random.default_rng(1).pareto(1.0, 2400).astype(int).clip(0, 62) + 2
    rows = [{"length": n, **{name: list(range(3, 3 + n)) for name in FEATURES}} for n in lengths.tolist()]
    return write_files(tmp_path_factory.mktemp("skewed"), rows[:900], rows[900:]), lengths.tolist()


def test_rows_of_like_length_share_a_batch(skewed: tuple[list[str], list[int]]) -> None:
    files, lengths = skewed
    batches = read(files, max_length=64, batch_size=8)
    places = sum(batch["item_index"].numel() for batch in batches)
    counted = [sum(numbers) for numbers in zip(*map(padding, batches), strict=True)]
    assert counted == [places - sum(lengths), places]
    assert counted[0] / counted[1] < 0.05
    by_chance = sum(8 * max(lengths[start : start + 8]) for start in range(0, 2400, 8))
    assert 1 - sum(lengths) / by_chance > 0.5


def test_batches_come_in_no_order_of_length_but_alike_on_all_ranks(skewed: tuple[list[str], list[int]]) -> None:
    widths = [
        [batch["item_index"].shape[1] for batch in read(skewed[0], rank, 2, max_length=64, batch_size=32)]
        for rank in range(2)
    ]
    assert sorted(widths[0]) not in (widths[0], widths[0][::-1])
    assert np.corrcoef(widths)[0, 1] > 0.95


def test_what_is_drawn_comes_from_the_seed_alone(tmp_path: Path) -> None:
    files = write_files(tmp_path, make_rows(20, 1), make_rows(20, 2))
    drawn: dict[str, Any] = {"later_share": 0.5, "horizon": 4}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = read(files, **drawn)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = read(files, **drawn), read(files, seed=6, **drawn)
    assert same(first, again)
    assert as_rows(first) != as_rows(other)
    assert sorted(row[0] for row in as_rows(first)) == sorted(row[0] for row in as_rows(other))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_can_be_entered_at_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", 12)
    files = write_files(tmp_path, make_rows(30, 1), make_rows(9, 2), make_rows(20, 3), row_group_size=7)
    drawn: dict[str, Any] = {"later_share": 0.5, "horizon": 4}
    whole = read(files, rank, 2, **drawn)
    assert len(whole) == 8
    for skip in range(10):
        assert same(read(files, rank, 2, skip=skip, **drawn), whole[skip:])


def test_what_was_skipped_is_not_read_and_what_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", 8)
    files = write_files(tmp_path, *(make_rows(8, number) for number in range(5)))
    threads = threading.active_count()
    needed = 0
    for url in files:
        path = Path(url.removeprefix("file://"))
        good = path.read_bytes()
        damage(url)
        try:
            assert len(read(files, skip=6)) == 4
        except OSError:
            needed += 1
        with pytest.raises(OSError, match="Couldn't deserialize thrift"):
            read(files)
        path.write_bytes(good)
    assert needed == 2  # 16 of 40 rows are left
    assert threading.active_count() == threads


def test_the_threads_end_with_the_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", 8)
    monkeypatch.setattr(data, "READY_ROWS", 8)
    files = write_files(tmp_path, *(make_rows(8, number) for number in range(20)))
    threads = threading.active_count()
    for batches_taken in (0, 1):
        batches = read_batches(files, max_length=MAX_LENGTH, batch_size=4, rank=0, size=1, seed=5)
        assert threading.active_count() > threads  # they read from the start
        assert [len(batch["item_index"]) for batch in islice(batches, batches_taken)] == [4] * batches_taken
        batches.close()
        assert threading.active_count() == threads


def test_large_batches_too_are_made_only_a_few_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_ROWS", 8)
    monkeypatch.setattr(data, "READY_ROWS", 8)
    rows, make = [], data._batches
    monkeypatch.setattr(data, "_batches", lambda *of: (rows.append(len(b["item_index"])) or b for b in make(*of)))
    files = write_files(tmp_path, make_rows(160))
    batches = read_batches(files, max_length=MAX_LENGTH, batch_size=8, rank=0, size=1, seed=5)
    assert len(next(batches)["item_index"]) == 8
    batches.close()
    assert sum(rows) <= 4 * 8


def test_a_row_longer_than_the_model_keeps_its_newest_actions(tmp_path: Path) -> None:
    rows = [row for row in make_rows(40) if row["length"] > 3]
    batches = read(write_files(tmp_path, rows), max_length=3)
    assert sorted(as_rows(batches)) == sorted(tuple(values[-3:] for values in row) for row in as_tuples(rows))


@pytest.mark.parametrize("shuffle_baskets", [False, True])
def test_a_basket_comes_in_the_logs_order_where_that_is_wanted(tmp_path: Path, shuffle_baskets: bool) -> None:
    rows = [
        row | {"gap_bucket": [1] + [2] * (row["length"] - 1), "session_end": [1] * (row["length"] - 1) + [2]}
        for row in make_rows(40)
    ]
    found = as_rows(read(write_files(tmp_path, rows), shuffle_baskets=shuffle_baskets))
    assert (sorted(found) == sorted(as_tuples(rows))) is not shuffle_baskets

    def together(row: tuple[tuple[int, ...], ...]) -> Any:
        """A row without the order of its actions, but for the features that stay with their places."""
        features = dict(zip(FEATURES, row, strict=True))
        staying = [features.pop(name) for name in OF_PLACE]
        return staying, sorted(zip(*features.values(), strict=True))

    assert sorted(map(together, found)) == sorted(map(together, as_tuples(rows)))


def test_only_actions_of_one_moment_change_places() -> None:
    #         |one moment |    |one |
    gaps = [2, 2, 2, 9, 9, 2, 9]  # the row begins in the midst of a moment
    order = shuffle_moments(np.array(gaps * 200, np.int32), np.full(200, 7), np.random.default_rng(1))
    places = order.reshape(200, 7) - 7 * np.arange(200)[:, None]
    for moment in ([0, 1, 2], [3], [4, 5], [6]):
        assert (np.sort(places[:, moment]) == moment).all()
    assert len({tuple(row) for row in places.tolist()}) == 6 * 2  # every order of the three and of the two


def targets(
    items: list[list[int]], session_ends: list[list[int]], later_share: float, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """(session_end, target), [200, actions], of the rows taken 200 times."""
    flat = [np.array([value for row in rows for value in row] * 200, np.int32) for rows in (items, session_ends)]
    lengths = np.array([len(row) for row in items] * 200)
    chosen = choose_targets(*flat, lengths, later_share=later_share, horizon=horizon, random=np.random.default_rng(1))
    assert chosen[0].dtype == chosen[1].dtype == np.int32
    return chosen[0].reshape(200, -1), chosen[1].reshape(200, -1)


@pytest.mark.parametrize(("horizon", "later"), [(1, [14]), (2, [14, 15]), (99, [14, 15, 16])])
def test_an_action_asked_for_later_sessions_gets_one_of_their_first_actions(horizon: int, later: list[int]) -> None:
    # Sessions (11 12 13), (14), (15 16); the second row is one session.
    items, session_ends = [[11, 12, 13, 14, 15, 16], [21, 22]], [[1, 1, 2, 2, 1, 2], [1, 2]]
    ends, asked = targets(items, session_ends, 1.0, horizon)
    found = [sorted({*asked[:, place].tolist()}) for place in range(8)]
    # The last session has none after it: its actions are asked for the next action as ever.
    assert found == [later, later, later, [15, 16][:horizon], [16], [0], [22], [0]]
    assert {tuple(row) for row in ends.tolist()} == {(2, 2, 2, 2, 1, 2, 1, 2)}


@pytest.mark.parametrize("later_share", [0.0, 0.5, 1.0])
def test_only_actions_of_the_event_types_to_predict_are_targets(tmp_path: Path, later_share: float) -> None:
    """Against a plain search: of all rows, the items that each action may be asked for."""
    random, horizon, types = np.random.default_rng(1), 2, [2, 5]
    rows = []
    for length in [*range(1, 20)] * 10:
        row = {name: random.integers(3, 9, length).tolist() for name in FEATURES}
        first = 100 * (len(rows) + 1)
        row |= {"length": length, "item_index": list(range(first, first + length)), "gap_bucket": [9] * length}
        row |= {"event_type_index": random.integers(1, 7, length).tolist()}
        row |= {"session_end": random.integers(1, 3, length).tolist()}
        rows.append(row)
    rows[-1]["event_type_index"] = [1] * 19  # no target
    settings = {"later_share": later_share, "horizon": horizon, "target_types": types, "max_length": 32}
    asked: dict[int, list[int]] = {}
    for batch in read(write_files(tmp_path, rows), **settings):
        asked |= {
            row[0]: found for row, found in zip(batch["item_index"].tolist(), batch[TARGET].tolist(), strict=True)
        }
    seen = 0
    for row in rows:
        items, found = row["item_index"], asked[row["item_index"][0]]
        wanted = [at for at, kind in enumerate(row["event_type_index"]) if kind in types]
        for place in range(row["length"]):
            following = [at for at in wanted if at > place][:1]
            ends = [at for at in range(place, row["length"]) if row["session_end"][at] == 2 or at == row["length"] - 1]
            later = [at for at in wanted if at > ends[0]][:horizon]
            may = following if later_share == 0 or not later else later if later_share == 1 else following + later
            assert found[place] in ([items[at] for at in may] or [0]), (row, place)
            seen += bool(may)
        assert not any(found[row["length"] :])
    assert seen > 500


def test_the_share_of_actions_asked_for_later_sessions_is_a_setting() -> None:
    items, session_ends = [[11, 12, 13, 14]], [[1, 1, 2, 2]]
    ends, asked = targets(items, session_ends, 0.0, 9)
    assert {tuple(row) for row in asked.tolist()} == {(12, 13, 14, 0)}
    assert {tuple(row) for row in ends.tolist()} == {(1, 1, 2, 2)}
    ends, _ = targets(items, session_ends, 0.5, 9)
    assert 0.35 < (ends[:, 0] == 2).mean() < 0.65


def test_only_petastorms_warnings_are_silenced(tmp_path: Path) -> None:
    # In a process of its own: pytest has its own filters.
    script = f"""
import warnings
from training.data import read_batches
files = {write_files(tmp_path, make_rows(4))!r}
assert len(list(read_batches(files, max_length=8, batch_size=4, rank=0, size=1, seed=1))) == 1
warnings.warn("ours", FutureWarning)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr.count("Warning") == 1
    assert "FutureWarning: ours" in run.stderr


def test_held_targets_are_the_known_items_of_the_first_moment(tmp_path: Path) -> None:
    def at(hour: int) -> datetime:
        return datetime(2024, 5, 1, hour, tzinfo=timezone.utc)

    rows = make_rows(5)
    nexts = [
        ([3, 4, 5], [at(1), at(1), at(2)]),  # two at the first moment
        ([], []),  # nothing next: not held
        ([1, 3], [at(3), at(4)]),  # only an unknown one at the first moment: not held
        ([7, 99, 6], [at(5), at(5), at(5)]),  # 99 is newer than the model, 6 is not in its vocabulary
        ([3], [at(9)]),
    ]
    for row, (items, times) in zip(rows, nexts, strict=True):
        row.update(target_item_index=items, target_ts=times)
    lists = [(name, pa.list_(pa.int32())) for name in (*FEATURES, "target_item_index")]
    schema = pa.schema([("length", pa.int32()), *lists, ("target_ts", pa.list_(pa.timestamp("us", "UTC")))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "valid.parquet")
    known = np.array([False, False, True, True, True, True, False, True, True, True])

    held = read_held([f"file://{tmp_path}/valid.parquet"], MAX_LENGTH, known, max_users=10)
    assert (held.targets.tolist(), held.offsets.tolist()) == ([3, 4, 7, 3], [0, 2, 3, 4])
    # Users that are not held make no room for others: as many as are wanted, the first ones.
    first = read_held([f"file://{tmp_path}/valid.parquet"], MAX_LENGTH, known, max_users=2)
    assert (first.targets.tolist(), first.offsets.tolist()) == ([3, 4, 7], [0, 2, 3])
    np.testing.assert_array_equal(first.actions, held.actions[:, :2])
    for position, row in enumerate([rows[0], rows[3], rows[4]]):
        assert held.actions[0, position, : row["length"]].tolist() == row["item_index"]
    second = held.part(1, 2)
    assert (second.targets.tolist(), second.offsets.tolist(), second.actions.shape[1]) == ([7], [0, 1], 1)
    assert held.part(3, 4).offsets.tolist() == [0]
    # The second batch brings two where one more is wanted.
    for row, items in zip(rows, ([3], [], [4], [5], [7]), strict=True):
        row.update(target_item_index=items, target_ts=[at(1)] * len(items))
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "more.parquet")
    more = read_held([f"file://{tmp_path}/more.parquet"], MAX_LENGTH, known, max_users=2)
    assert (more.targets.tolist(), more.offsets.tolist(), more.actions.shape[1]) == ([3, 4], [0, 1, 2], 2)


def test_held_targets_that_are_not_new_are_passed_over(tmp_path: Path) -> None:
    def held(max_users: int) -> Held:
        files = [f"file://{tmp_path}/valid.parquet"]
        return read_held(files, MAX_LENGTH, np.arange(10) > 1, max_users, new_only=True)

    nexts = [  # items acted on before, then items and times of the targets
        ([4, 5], [4, 3, 6], [1, 2, 2]),  # the first moment that has a new one
        ([3], [3], [1]),  # nothing new: not held
        ([], [3], [1]),
        ([1, 7], [1, 3], [1, 2]),  # an unknown item is nobody's old one: not held
        ([2, 3, 8], [9, 2], [1, 1]),
    ]
    rows = make_rows(5)
    for row, (seen, items, times) in zip(rows, nexts, strict=True):
        row.update(seen_item_index=seen, target_item_index=items, target_ts=times)
    lists = [(name, pa.list_(pa.int32())) for name in (*FEATURES, "target_item_index", "seen_item_index")]
    schema = pa.schema([("length", pa.int32()), *lists, ("target_ts", pa.list_(pa.int64()))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "valid.parquet")

    assert (held(9).targets.tolist(), held(9).offsets.tolist()) == ([3, 6, 3, 9], [0, 2, 3, 4])
    for found, seen, offsets in (
        (held(9), [4, 5, 2, 3, 8], [0, 2, 2, 5]),
        (held(2), [4, 5], [0, 2, 2]),
        (held(9).part(0, 2), [4, 5, 2, 3, 8], [0, 2, 5]),
    ):
        assert (found.seen.tolist(), found.seen_offsets.tolist()) == (seen, offsets)
