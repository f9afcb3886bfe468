import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.sequence_files import MAX_LENGTH, make_rows, write_files
from training.batches import FEATURES, TARGET, pad
from training.data import choose_targets, read_batches, read_held, shuffle_moments


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=6), st.integers(1, 4))
def test_pad_equals_plain_python(rows: list[list[int]], width: int) -> None:
    lengths = np.array([len(row) for row in rows], int)
    padded = pad(np.array([value for row in rows for value in row], np.int32), lengths, width)
    newest = [row[-width:] for row in rows]
    assert padded.tolist() == [row + [0] * (width - len(row)) for row in newest]


def read(files: list[str], rank: int = 0, size: int = 1, seed: int = 5, max_length: int = MAX_LENGTH) -> list[Any]:
    torch.manual_seed(seed)
    return list(read_batches(files, max_length=max_length, batch_size=4, rank=rank, size=size, seed=seed))


def as_rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[tuple[int, ...], ...]]:
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


def test_ranks_read_different_rows_and_together_all_of_them_once(tmp_path: Path) -> None:
    rows = make_rows(31)
    files = write_files(tmp_path, rows[:3], rows[3:12], rows[12:14], rows[14:])
    parts = [as_rows(read(files, rank, 3)) for rank in range(3)]
    assert all(parts)
    assert sorted(row for part in parts for row in part) == sorted(as_tuples(rows))


def test_batches_are_full_and_cut_to_their_longest_row(tmp_path: Path) -> None:
    rows = make_rows(11)
    batches = read(write_files(tmp_path, rows[:2], rows[2:]))
    assert [len(batch["item_index"]) for batch in batches] == [4, 4, 3]
    for batch in batches:
        assert {tuple(batch[name].shape) for name in FEATURES} == {tuple(batch["item_index"].shape)}
        assert batch["item_index"][:, -1].any()


def test_the_order_comes_from_the_seed_alone(tmp_path: Path) -> None:
    files = write_files(tmp_path, make_rows(20, 1), make_rows(20, 2))
    first, again, other = (as_rows(read(files, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_a_row_longer_than_the_model_keeps_its_newest_actions(tmp_path: Path) -> None:
    rows = [row for row in make_rows(40) if row["length"] > 3]
    batches = read(write_files(tmp_path, rows), max_length=3)
    assert sorted(as_rows(batches)) == sorted(tuple(values[-3:] for values in row) for row in as_tuples(rows))


def actions(**features: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch whose other features are the items' numbers times ten, so that they can be seen to stay together."""
    items = torch.tensor(features["item_index"])
    rest = {name: items * 10 for name in FEATURES[1:]}
    return {**rest, **{name: torch.tensor(values) for name, values in features.items()}}


def test_only_actions_of_one_moment_change_places() -> None:
    #                      |one moment |    |one |        |padding
    batch = actions(
        item_index=[[11, 12, 13, 14, 15, 16, 17, 0, 0]] * 200,
        gap_bucket=[[1, 2, 2, 9, 9, 2, 9, 0, 0]] * 200,
        session_end=[[1, 1, 2, 2, 1, 2, 2, 0, 0]] * 200,
    )
    torch.manual_seed(1)
    mixed = shuffle_moments(batch)
    for moment in ([0, 1, 2], [3], [4, 5], [6], [7, 8]):
        before, after = batch["item_index"][:, moment], mixed["item_index"][:, moment]
        assert torch.equal(after.sort(dim=1).values, before.sort(dim=1).values)
    orders = {tuple(row) for row in mixed["item_index"].tolist()}
    assert len(orders) == 6 * 2  # every order of the three and of the two
    for name in set(FEATURES) - {"item_index", "gap_bucket", "session_end"}:
        assert torch.equal(mixed[name], mixed["item_index"] * 10)
    for name in ("gap_bucket", "session_end"):
        assert torch.equal(mixed[name], batch[name])


@pytest.mark.parametrize(("horizon", "later"), [(1, [14]), (2, [14, 15]), (99, [14, 15, 16])])
def test_an_action_asked_for_later_sessions_gets_one_of_their_first_actions(horizon: int, later: list[int]) -> None:
    # Sessions (11 12 13), (14), (15 16), and padding; the second row is one session.
    batch = actions(
        item_index=[[11, 12, 13, 14, 15, 16, 0], [21, 22, 0, 0, 0, 0, 0]] * 200,
        session_end=[[1, 1, 2, 2, 1, 2, 0], [1, 2, 0, 0, 0, 0, 0]] * 200,
    )
    torch.manual_seed(1)
    asked = choose_targets(batch, 1.0, horizon)
    targets = [sorted({*asked[TARGET][0::2, place].tolist()}) for place in range(7)]
    # The last session has none after it: its actions are asked for the next action as ever.
    assert targets == [later, later, later, [15, 16][:horizon], [16], [0], [0]]
    assert asked["session_end"][0].tolist() == [2, 2, 2, 2, 1, 2, 0]
    assert asked[TARGET][1].tolist() == [22, 0, 0, 0, 0, 0, 0]


def test_the_share_of_actions_asked_for_later_sessions_is_a_setting() -> None:
    batch = actions(item_index=[[11, 12, 13, 14]] * 200, session_end=[[1, 1, 2, 2]] * 200)
    torch.manual_seed(1)
    none = choose_targets(batch, 0.0, 9)
    assert none[TARGET][0].tolist() == [12, 13, 14, 0]
    assert torch.equal(none["session_end"], batch["session_end"])
    half = (choose_targets(batch, 0.5, 9)["session_end"] == 2)[:, 0].float().mean()
    assert 0.35 < half < 0.65


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
    for position, row in enumerate([rows[0], rows[3], rows[4]]):
        assert held.actions[0, position, : row["length"]].tolist() == row["item_index"]
    second = held.part(1, 2)
    assert (second.targets.tolist(), second.offsets.tolist(), second.actions.shape[1]) == ([7], [0, 1], 1)
    assert held.part(3, 4).offsets.tolist() == [0]
