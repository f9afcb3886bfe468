"""The loop in real processes, started as `trailvec train` starts them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs.commits import Commit, _commit_of
from jobs.errors import TrailvecError, explain
from jobs.launch_training import _stopped, last_words, launch, launch_in_spark, parse_event
from jobs.ranking import flatten
from jobs.runtime import Runtime, digest
from jobs.tables import SEQUENCES
from jobs.train import (
    STAGE,
    Listener,
    _has_learnt_all,
    _refuse_rows_of_another_vocabulary,
    base_of,
    check_growth,
    epochs,
    run,
    run_spec,
)
from tests.conftest import make_config
from tests.sequence_files import (
    ITEMS,
    MAX_LENGTH,
    SPEC,
    damage,
    item_counts,
    make_rows,
    make_run,
    next_items,
    write_valid,
)
from training import dist, validation
from training.batches import FEATURES
from training.checkpoint import Progress, checkpoints, newest_checkpoint, read_checkpoint, write_checkpoint
from training.config import RunSpec, TrainSettings
from training.data import Batch, read_held
from training.loop import _optimizer_step, knows_bfloat16, rate_factor, scale_gradients, schedule, train
from training.model import build_model
from training.validation import best_items, validate

# With all that draws random numbers.
DRAWING = SPEC.model_copy(update={"dropout": 0.3, "negatives": 12})
ROW_WISE = {"sparse": True}
HALF = {"sparse": True, "item_precision": "bfloat16"}


def start(spec: RunSpec, folder: Path) -> list[dict[str, Any]]:
    run_file = folder / "run.json"
    run_file.write_text(spec.model_dump_json())
    said: list[dict[str, Any]] = []
    launch(run_file, spec, said.append)
    return said


def ndcg(ranked: list[int], relevant: set[int]) -> float:
    gain = sum(1 / math.log2(rank + 1) for rank, item in enumerate(ranked, start=1) if item in relevant)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), len(ranked)) + 1))


def training_of(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "model/model.json").read_text())["training"]
    return about


# Unequal ranks, one row group for both: the mean must be over all positions, not over ranks.
UNEQUAL: dict[str, Any] = {"parts": [make_rows(49)], "epochs": 3, "learning_rate": 0.05, "rate_scaling": "none"}
# Of two ranks the first has no row in any step, and the other the same as one alone.
ONE_ROW: dict[str, Any] = {
    **UNEQUAL,
    "parts": [[row for row in make_rows(20) if row["length"] > 3][:1]],
    "model": SPEC.model_copy(update=HALF),
}
DRAWS = {"dropout": 0.3, "negatives": 12, "later_share": 0.5, "weight_decay": 0.01, "learning_rate": 0.02}
# All items are right for each of the three users of two ranks: no epoch is better than the first, and training ends
# after two of the nine.
SHORT: dict[str, Any] = {
    **DRAWS,
    "parts": [make_rows(60, 1), make_rows(60, 2)],
    "valid": (make_rows(3, 3), [list(range(2, 29))] * 3),
    "model": DRAWING.model_copy(update=ROW_WISE),  # the table's rows by the one optimizer, all else by AdamW
    "batch_size": 4,
    "epochs": 9,
    "patience": 1,
    "fp16_gradients": True,
    "processes": 2,
}
TwoRanks = tuple[Path, list[dict[str, Any]]]
_TRAIN_ALL = """
import json, resource, sys, torch
from pathlib import Path
from training.config import RunSpec
from training.loop import train

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)  # 40 MB, freed at once: more than malloc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = fresh_pages()
for run_file in sys.argv[1:]:
    train(RunSpec.model_validate_json(Path(run_file).read_text()))
fresh_pages()
print(json.dumps({"event": "fresh_pages", "before": before, "kept": fresh_pages()}))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """Trainings by two ranks, each in a folder of its name, and what they said: one after the other in the same two
    processes, which take longer to import PyTorch than to train."""
    folder = tmp_path_factory.mktemp("two_ranks")
    files = []
    in_steps = UNEQUAL | {"processes": 2, "batch_size": 13, "local_steps": 2}
    for name, settings in {
        "adamw": in_steps,
        "rowwise": in_steps | {"model": SPEC.model_copy(update=ROW_WISE)},
        "one_row": ONE_ROW | {"processes": 2},
        "short": SHORT,
    }.items():
        files.append(str(folder / name / "run.json"))
        spec = make_run(folder / name, **settings)
        Path(files[-1]).write_text(spec.model_dump_json())
    launcher = [sys.executable, "-m", "training.horovodrun", "--gloo", "-np", "2", "-H", "localhost:2"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", _TRAIN_ALL, *files], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, [event for line in done.stdout.splitlines() if (event := parse_event(line))]


def test_one_of_two_ranks_says_when_an_epoch_ends(two_ranks: TwoRanks) -> None:
    said = [line["epoch"] for line in two_ranks[1] if line["event"] == "epoch"]
    assert said == [*[1, 2, 3] * 3, 1, 2]


def test_a_steps_memory_serves_the_next_one(two_ranks: TwoRanks) -> None:
    pages = [line for line in two_ranks[1] if line["event"] == "fresh_pages"]
    assert len(pages) == 2
    assert all(of["kept"] < 100 < of["before"] for of in pages)


@pytest.mark.parametrize(("name", "table"), [("adamw", {}), ("rowwise", ROW_WISE)], ids=["adamw", "rowwise"])
def test_two_ranks_and_local_steps_step_like_one_with_all_their_rows(
    tmp_path: Path, two_ranks: TwoRanks, name: str, table: dict[str, Any]
) -> None:
    same = UNEQUAL | {"model": SPEC.model_copy(update=table)}
    train(make_run(tmp_path / "local", **same, processes=1, batch_size=10, local_steps=5))
    train(make_run(tmp_path / "one", **same, processes=1, batch_size=50))

    folders = {"one": tmp_path / "one", "two": two_ranks[0] / name, "local": tmp_path / "local"}
    after = {name: training_of(folder) for name, folder in folders.items()}
    assert sorted(after["two"]["epochs"][0]["rows_by_rank"]) == [24, 25]
    assert after["one"]["epochs"][0]["rows_by_rank"] == [49]
    losses = {name: [epoch["loss"] for epoch in training["epochs"]] for name, training in after.items()}
    assert losses["two"][2] < losses["two"][0]
    tensors = {name: load_file(folder / "model/model.safetensors") for name, folder in folders.items()}
    for other in ("two", "local"):
        assert losses[other] == pytest.approx(losses["one"], rel=1e-4)
        for name, tensor in tensors["one"].items():
            torch.testing.assert_close(tensors[other][name], tensor, atol=1e-3, rtol=0)


def test_a_rank_without_rows_takes_part(tmp_path: Path, two_ranks: TwoRanks) -> None:
    two = two_ranks[0] / "one_row"
    train(make_run(tmp_path, **ONE_ROW, processes=1))
    assert training_of(two)["epochs"][0]["rows_by_rank"] == [0, 1]
    tensors = [load_file(folder / "model/model.safetensors") for folder in (two, tmp_path)]
    assert tensors[0]["table.own.weight"].dtype == torch.bfloat16
    for name, tensor in tensors[1].items():
        torch.testing.assert_close(tensors[0][name], tensor, atol=1e-4, rtol=0)


def test_a_row_wise_table_learns_as_a_dense_one(tmp_path: Path) -> None:
    rows, held = make_rows(300), make_rows(60, 3)
    settings = {"epochs": 8, "learning_rate": 0.01, "batch_size": 8, "later_share": 0.0}
    best = {}
    for name, table in {"dense": {}, "rowwise": ROW_WISE, "bfloat16": HALF}.items():
        model = SPEC.model_copy(update={"negatives": 12, **table})
        train(make_run(tmp_path / name, [rows], (held, next_items(held)), model, **settings))
        best[name] = max(epoch["ndcg@10"] for epoch in training_of(tmp_path / name)["epochs"])
    assert best["dense"] > 0.95
    assert best["rowwise"] > best["dense"] - 0.03
    assert best["bfloat16"] > best["dense"] - 0.03


def test_padding_is_what_the_batches_hold_beyond_their_actions(tmp_path: Path) -> None:
    rows = make_rows(50)
    train(make_run(tmp_path, [rows], batch_size=50, epochs=1))
    lengths = [row["length"] for row in rows]
    epoch = training_of(tmp_path)["epochs"][0]
    assert epoch["padding"] == pytest.approx(1 - sum(lengths) / (50 * max(lengths)))
    assert 0 < epoch["data_wait"] < 1


# ---- a stop in the middle, and the same command again


def kill_in_the_middle(spec: RunSpec, folder: Path, rank: int) -> str:
    """Starts the run and kills a rank when there is a checkpoint from inside epoch 2; what launch says then, within a
    minute."""
    killed_at: list[float] = []

    def kill() -> None:
        while not list(Path(spec.checkpoints or "").glob("00002-*[1-9]*")):
            time.sleep(0.002)
        for process in processes_with(str(folder / "run.json")):
            environment = Path(f"/proc/{process}/environ").read_text().split("\0")
            if spec.settings.processes == 1 or f"HOROVOD_RANK={rank}" in environment:
                os.kill(process, signal.SIGKILL)
                killed_at.append(time.monotonic())

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(TrailvecError) as error:
        start(spec, folder)
    killer.join()
    assert time.monotonic() - killed_at[0] < 60
    assert processes_with(str(folder / "run.json")) == []
    said = str(error.value)
    assert "the same command resumes from epoch 2 after" in said
    assert said.endswith("steps")
    assert "\n" not in said
    return said


def check_resumed(killed: Path, whole: Path) -> None:
    """After the kill and the second start: all is as if there had been none."""
    after, expected = training_of(killed), training_of(whole)
    assert after["parameters_sha256_by_rank"] == expected["parameters_sha256_by_rank"]
    assert after["curve"] == expected["curve"]
    for epoch, wanted in zip(after["epochs"], expected["epochs"], strict=True):
        same = ("loss", "loss_by_rank", "rows_by_rank", "positions", "padding", "ndcg@10", "by_history")
        assert {name: epoch[name] for name in same} == {name: wanted[name] for name in same}
    # The last epoch's end: parameters, the optimizer's state and random numbers.
    one, other = (sorted((folder / "checkpoints").glob("0*"))[-1] / "state.safetensors" for folder in (killed, whole))
    assert one.parent.name == other.parent.name
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{}, HALF, {"architecture": "electra", "objective": "rtd"}, {"architecture": "xlnet", "objective": "plm"}],
    ids=["adamw", "rowwise", "rtd", "plm"],
)
def test_a_killed_process_goes_on_to_the_same_parameters(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = DRAWING.model_copy(update=changes)
    parts, rows = [make_rows(60, 1), make_rows(60, 2)], make_rows(20, 3)
    settings = {**DRAWS, "batch_size": 2, "epochs": 2, "local_steps": 2}
    whole = make_run(tmp_path / "whole", parts, (rows, next_items(rows)), model, **settings)
    settings |= {"checkpoint_minutes": 0, "keep_checkpoints": 99}
    killed = make_run(tmp_path / "killed", parts, (rows, next_items(rows)), model, **settings)
    train(whole)
    if changes == HALF:
        said = kill_in_the_middle(killed, tmp_path / "killed", rank=0)
        assert said.startswith("training stopped: process 0 was killed by signal 9")
        assert not (tmp_path / "killed/model/model.json").exists()
    else:  # what it leaves, without a process
        train(killed)
        inside = [place for place in checkpoints(tmp_path / "killed/checkpoints") if place.name > "00002-0000000000"]
        for checkpoint in inside[1:]:
            shutil.rmtree(checkpoint)
        (tmp_path / "killed/model/model.json").unlink()
    left = newest_checkpoint(tmp_path / "killed/checkpoints")
    assert left is not None
    assert read_checkpoint(left)[0].step > 0  # in the middle of the epoch
    train(killed)
    check_resumed(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(("killed_in", "goes_on_from"), [(2, ["00002-0000000000"]), (1, [])])
def test_a_place_inside_an_epoch_is_left_where_the_rows_lie_in_other_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], killed_in: int, goes_on_from: list[str]
) -> None:
    """After upkeep of the table. All rows once: as from the newest checkpoint between two epochs, or as from none."""
    rows, settings = make_rows(60), {"epochs": 2, "batch_size": 8, "keep_checkpoints": 99}
    spec = make_run(tmp_path / "killed", [rows[:30], rows[30:]], **settings, checkpoint_minutes=0)
    train(spec)
    for checkpoint in (tmp_path / "killed/checkpoints").iterdir():
        if checkpoint.name > f"0000{killed_in}-0000000003":
            shutil.rmtree(checkpoint)
    whole = make_run(tmp_path / "whole", [rows[::-1]], **settings)
    for name in goes_on_from:
        shutil.copytree(tmp_path / "killed/checkpoints" / name, tmp_path / "whole/checkpoints" / name)
    train(whole)
    capfd.readouterr()
    train(spec.model_copy(update={"train_files": whole.train_files}))
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(e["epoch"], e["step"]) for e in said if e["event"] == "left"][:3] == [(killed_in, n) for n in (3, 2, 1)]
    after, expected = training_of(tmp_path / "killed"), training_of(tmp_path / "whole")
    assert after["parameters_sha256_by_rank"] == expected["parameters_sha256_by_rank"]
    assert [epoch["rows_by_rank"] for epoch in after["epochs"]] == [[60], [60]]


def test_a_killed_rank_ends_the_run_which_goes_on_and_stops_early_as_without(
    tmp_path: Path, two_ranks: TwoRanks
) -> None:
    killed = make_run(tmp_path, **SHORT, checkpoint_minutes=0)
    said = kill_in_the_middle(killed, tmp_path, rank=1)
    assert said.startswith("training stopped: process 1 was killed by signal 9")
    resumed = start(killed, tmp_path)
    assert (resumed[0]["event"], resumed[0]["epoch"], resumed[0]["step"] > 0) == ("resumed", 2, True)
    check_resumed(tmp_path, two_ranks[0] / "short")
    training = training_of(tmp_path)
    assert (len(training["epochs"]), training["best_epoch"], training["held_users"]) == (2, 1, 3)
    assert training["parameters_sha256_by_rank"][0] == training["parameters_sha256_by_rank"][1]


def test_a_model_of_other_tables_that_had_these_names_is_grown_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that this very command has made, of these tables, is not: the command would never come to an end."""
    runtime = Runtime(make_config(tmp_path, "train.warm_start=true"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "current.json").write_text('{"model_version": "m2"}')
    with pytest.raises(TrailvecError, match=r"model m2 does not exist .*: set train\.warm_start = false to train from"):
        base_of(runtime)
    reads, ids = {"sequences": 7, "items": 2, "context_values": 2}, {"sequences": "a", "items": "b"}
    restored = Commit(2, 0.0, "RESTORE", True, False, None, True, None, False, 0)  # before the model was trained
    commits = [replace(restored, version=3, foreign=False), restored]
    made = {"code_version": "c", "config": runtime.config.model_dump(mode="json"), "reads": reads, "table_ids": ids}
    about = {"model_version": "m2", "grown_from": "m1", "provenance": made}
    monkeypatch.setattr("jobs.train.model_folder", lambda runtime, **_: tmp_path)
    monkeypatch.setattr("jobs.train.read_about", lambda folder: about)
    monkeypatch.setattr(runtime, "provenance", lambda: made)
    monkeypatch.setattr(runtime, "table_id", lambda table: runtime._table_ids[table.name])
    monkeypatch.setattr(runtime, "commits", lambda table: commits)
    for name in ("version", "changed_version"):
        monkeypatch.setattr(runtime, name, lambda table: reads[table.name])
    for sequences, base in (("a", "m1"), ("made anew", "m2")):
        monkeypatch.setattr(runtime, "_table_ids", {**ids, "sequences": sequences})
        assert base_of(runtime) == base
    # The vectors of its items would begin as those of others.
    monkeypatch.setattr(runtime, "_table_ids", {**ids, "items": "made anew"})
    with pytest.raises(TrailvecError, match=r"model m2 uses the numbers of tables .* that were removed since: set"):
        base_of(runtime)
    monkeypatch.setattr(runtime, "_table_ids", {**ids, "sequences": "made anew"})
    commits.insert(0, replace(restored, version=4))
    with pytest.raises(TrailvecError, match=r"has changed \(RESTORE, SQL\) since: set train.warm_start = false"):
        base_of(runtime)


def test_rows_with_the_numbers_of_other_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target would be another item, or beyond the table's end."""
    runtime = Runtime(make_config(tmp_path))
    made = {"config": runtime.config.model_dump(mode="json"), "reads": {"items": 2}, "table_ids": {"items": "a"}}
    monkeypatch.setattr(runtime, "last_writer", lambda table: made)
    monkeypatch.setattr(runtime, "table_id", lambda table: "made anew")
    with pytest.raises(
        TrailvecError, match=r"table sequences uses the numbers of .* that were removed since: run `trailvec b"
    ):
        run_spec(runtime, "m", tmp_path, None)
    for setting, said in (
        # Its model would pass for one that has learnt nobody's last action.
        ("split_by=leave_one_out", "split_by = time, not leave_one_out"),
        ('target_event_types=["ride"]', r"target_event_types = \[\], not \['ride'\]"),
        ("max_length=32", "max_length = 64, not 32"),  # half of a row would not be learnt
        ("max_parts=1", "max_parts = 64, not 1"),
        ("seen_days=0", "seen_days = 28, not 0"),
        ("valid_from=2024-06-01", "valid_from = None, not 2024-06-01T00:00:00"),
    ):
        runtime = Runtime(make_config(tmp_path, f"sequences.{setting}"))
        monkeypatch.setattr(runtime, "last_writer", lambda table: made)
        with pytest.raises(TrailvecError, match=rf"table sequences was made with sequences\.{said} as configured: run"):
            run_spec(runtime, "m", tmp_path, None)
    runtime.went_back = True  # to the rows of a killed training, which were checked when it began
    _refuse_rows_of_another_vocabulary(runtime)


def test_a_model_that_has_learnt_what_will_be_asked_is_not_grown_from() -> None:
    about: dict[str, Any] = {"spec": SPEC.model_dump(), "provenance": {"config": {"sequences": {"split_by": "time"}}}}
    check_growth("m1", about, SPEC.model_copy(update={"items": SPEC.items + 1}))
    about["provenance"] = {"config": {"sequences": {"split_by": "leave_one_out"}}}
    with pytest.raises(
        TrailvecError, match=r"m1 was trained with .* = leave_one_out, and may .*: set train\.warm_start = f"
    ):
        check_growth("m1", about, SPEC)


@pytest.mark.parametrize(
    ("split_by", "said"),
    [("time", "two events in the training window: set sequences.valid_from"), ("leave_one_out", "the two newest: ing")],
)
def test_without_rows_the_remedy_fits_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_by: str, said: str
) -> None:
    runtime = Runtime(make_config(tmp_path, f"sequences.split_by={split_by}"))
    nothing = {"training_files": {"train": []}, "item_counts": np.ones(9), "model_spec": SPEC}
    for name, value in {**nothing, "_refuse_rows_of_another_vocabulary": None}.items():
        monkeypatch.setattr(f"jobs.train.{name}", lambda *_, value=value: value)
    monkeypatch.setattr(runtime, "read", lambda table: None)
    with pytest.raises(TrailvecError, match=said):
        run_spec(runtime, "m", tmp_path, None)


def test_a_model_grows_from_the_base_that_its_version_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model may become current before training begins."""
    runtime = Runtime(make_config(tmp_path, "train.warm_start=true"))
    bases, asked = iter(["m1", "m2", "m3"]), []

    def folder(runtime: Runtime, version: str, **_: str) -> Path:
        asked.append(version)
        raise InterruptedError

    for name in ("training_files", "item_counts", "model_spec", "_refuse_rows_of_another_vocabulary"):
        monkeypatch.setattr(f"jobs.train.{name}", lambda *_: [])
    for name in ("read", "changed_version"):
        monkeypatch.setattr(runtime, name, lambda table: None)
    monkeypatch.setattr("jobs.train.base_of", lambda runtime: next(bases))
    monkeypatch.setattr("jobs.train.model_folder", folder)
    runtime._facts(STAGE)
    with pytest.raises(InterruptedError):
        _has_learnt_all(runtime)
    with pytest.raises(InterruptedError):
        run_spec(runtime, "m", tmp_path, None)
    assert asked == ["m1", "m1"]


def test_clm_alone_is_asked_for_later_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for one says so in an input, which another objective would learn from."""
    asked: list[float] = []

    def stop(*_: object, later_share: float, **__: object) -> None:
        asked.append(later_share)
        raise InterruptedError

    monkeypatch.setattr("training.loop.read_batches", stop)
    for objective in ("clm", "mlm"):
        model = SPEC.model_copy(update={"architecture": "xlnet", "objective": objective})
        with pytest.raises(InterruptedError):
            train(make_run(tmp_path / objective, [make_rows(5)], model=model, later_share=0.5))
    assert asked == [0.5, 0]


def test_rows_are_read_while_the_model_is_set_up_and_no_longer_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Mock()
    monkeypatch.setattr("training.loop.read_batches", lambda *_, **__: batches)
    monkeypatch.setattr("training.loop.build_model", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        train(make_run(tmp_path, [make_rows(5)]))
    batches.close.assert_called_once_with()


def test_the_event_types_to_predict_reach_the_batches_and_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def read(types: list[int] | None) -> Generator[Batch, None, None]:
        asked.append(types)
        return (batch for batch in ())

    def stop(_: object, types: torch.Tensor | None) -> None:
        asked.append(types)
        raise InterruptedError

    monkeypatch.setattr("training.loop.read_batches", lambda *_, target_types, **__: read(target_types))
    monkeypatch.setattr("training.loop.add_gradients", lambda *given: stop(*given[-2:]))
    run = make_run(tmp_path, [make_rows(5)])
    for types in (None, [2, 3]):
        with pytest.raises(InterruptedError):
            train(run.model_copy(update={"target_event_types": types}))
    assert asked[:3] == [None, None, [2, 3]]
    assert asked[3].tolist() == [2, 3]


def test_a_training_over_tables_that_were_made_anew_leaves_the_old_ones_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many commits they give the model the same version."""
    runtime = Runtime(make_config(tmp_path))
    runtime.fingerprint = "feed" * 16
    found: list[Any] = []

    def stop(runtime: Runtime, version: str, staging: Path, checkpoints: Path) -> None:
        found.append(checkpoints)
        raise InterruptedError

    monkeypatch.setattr("jobs.train._train", stop)
    for table_id in ("a", "a", "made anew"):
        monkeypatch.setattr(runtime, "_table_ids", {"sequences": table_id})
        with pytest.raises(InterruptedError):
            run(runtime)
    assert found[0] == found[1] != found[2]


def test_a_model_is_on_the_disk_before_its_checkpoints_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut in between there would be neither."""
    runtime = Runtime(make_config(tmp_path))
    runtime.fingerprint = "feed" * 16
    model = runtime.models / runtime.fingerprint[:12]
    flushed: dict[int, bool] = {}  # by inode, which a rename keeps: whether the model was in place then

    def make(runtime: Runtime, version: str, staging: Path, checkpoints: Path) -> None:
        checkpoints.mkdir()
        for name in ("model.json", "model.safetensors"):
            (staging / name).write_text("x")

    def remove(folder: Path) -> None:
        assert folder.name.endswith(".checkpoints")
        assert flushed == {
            **{place.stat().st_ino: False for place in (model, model / "model.json", model / "model.safetensors")},
            runtime.models.stat().st_ino: True,
        }
        raise InterruptedError

    monkeypatch.setattr("jobs.train._train", make)
    monkeypatch.setattr("jobs.train.remove_tree", remove)
    monkeypatch.setattr(os, "fsync", lambda file: flushed.update({os.fstat(file).st_ino: model.exists()}))
    with pytest.raises(InterruptedError):
        run(runtime)


def test_a_killed_training_is_gone_on_with_over_the_versions_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = True
    began: list[tuple[int, str]] = []
    notes: list[str] = []
    lines: list[str] = []
    checkpoint = ".00002-0000000000.1f.part"  # half written

    def stop(runtime: Runtime, version: str, staging: Path, checkpoints: Path) -> None:
        assert checkpoints.name.startswith(f"{version}_")
        began.append((runtime.version(SEQUENCES), checkpoints.name))
        (checkpoints / checkpoint).mkdir(parents=True, exist_ok=True)
        (checkpoints / checkpoint / "checkpoint.json").touch()
        (checkpoints / "begun.json").write_text(json.dumps(runtime.provenance()))
        raise InterruptedError

    def command(version: int, *sets: str, force: bool = False) -> str:
        """The name of the folder that it trains in."""
        runtime = Runtime(make_config(tmp_path, *sets))
        config = runtime.config.model_dump(mode="json")
        runtime._stage, runtime.forced, runtime._table_ids = STAGE, force, {"sequences": "a"}
        runtime._versions = {"sequences": version, "items": 2, "context_values": 2}
        monkeypatch.setattr(runtime, "changed_version", runtime.version)
        monkeypatch.setattr(runtime, "can_go_back", lambda begun: kept)
        monkeypatch.setattr(
            runtime,
            "provenance",
            lambda: (
                {"code_version": "c", "config": config, "reads": runtime._versions, "table_ids": runtime._table_ids}
                | {"fingerprint": runtime.fingerprint}
            ),
        )
        runtime.fingerprint = digest(runtime._facts(STAGE))
        runtime.on_progress = lines.append
        with pytest.raises(InterruptedError):
            run(runtime)
        assert runtime.went_back == (began[-1][0] < version)
        notes[:] = runtime.report.notes
        return began[-1][1]

    monkeypatch.setattr("jobs.train._train", stop)
    models = tmp_path / "models"
    half = command(6)
    checkpoint = "00002-0000000000"
    first = command(7)
    assert first != half
    assert command(9) == first
    assert notes[0].startswith("resumes the training that was stopped, on the tables as they were then (sequence")
    assert lines == notes  # at once, and at the end
    forced, other = command(9, force=True), command(9, "train.seed=5")  # they begin anew
    assert [version for version, _ in began] == [6, 7, 7, 9, 9]
    assert forced.endswith(".forced.checkpoints")
    # Under another name it would be gone on with over its tables, but not from its checkpoints.
    copy = (models / first).rename(models / "copy.checkpoints")
    shutil.rmtree(models / command(8))
    assert began[-1][0] == 8
    copy.rename(models / first)
    # It has a model of newer rows: what it left is not gone on with, until that can't be any more and is removed.
    made = json.loads((models / first / "begun.json").read_text())
    (models / "m").mkdir()
    (models / ".m.1f.staging").mkdir()  # of a run killed before its model was in place
    (models / ".m.1f.staging/model.json").write_text(json.dumps({"provenance": made}))
    made["reads"] |= {"sequences": 8, "items": 1}
    (models / "m/model.json").write_text(json.dumps({"provenance": made}))
    assert command(10) == first  # older items
    made["reads"]["items"] = 2
    (models / "m/model.json").write_text(json.dumps({"provenance": made}))
    newer = command(10)
    assert newer != first
    kept = False
    last = command(11)
    left = {place.name for place in models.glob("*.checkpoints")}
    assert left == {last, other}


def test_a_killed_training_is_not_gone_on_with_over_rows_that_had_to_go_or_that_others_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(make_config(tmp_path))
    runtime._stage = STAGE
    monkeypatch.setattr(runtime, "kept", lambda *_: True)
    monkeypatch.setattr(runtime, "at", lambda *_: SimpleNamespace(inputFiles=list))

    def can_go_back(operation: str, **said: Any) -> bool:
        """After such a commit, of trailvec where it says something."""
        text = json.dumps({"stage": "s", "reads": {}} | said) if said else ""
        since = _commit_of(3, {"timestamp": 0, "operation": operation, "userMetadata": text})
        monkeypatch.setattr(runtime, "_newer", lambda *_: [since])
        return runtime.can_go_back({"reads": {table.name: 2 for table in STAGE.reads}})

    assert can_go_back("MERGE", note={})
    assert can_go_back("OPTIMIZE")
    assert not can_go_back("MERGE", note={"erasure": "e"})
    assert not can_go_back("DELETE")
    assert not can_go_back("RESTORE")


def test_a_stopped_training_says_what_the_same_command_does(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(5)])
    for name, said in (
        ("m", "steps"),
        ("m.forced", "maintain_tables runs first: from an earlier checkpoint, or from scratch)"),
    ):
        folder = tmp_path / f"{name}.checkpoints"
        write_checkpoint(folder, Progress(ranks=1, epoch=2, step=3), {"x": torch.zeros(1)}, keep=1)
        of_folder = spec.model_copy(update={"checkpoints": str(folder)})
        assert str(_stopped(of_folder, ["RuntimeError: x"], 1)).endswith(said)
        # The same command would meet it again.
        broken = "[1]<stderr>:jobs.errors.TrailvecError: the loss is nan in epoch 2: lower train.learning_rate"
        assert str(_stopped(of_folder, [broken], 1)).endswith("lower train.learning_rate; no model was replaced")
    unreachable = spec.model_copy(update={"checkpoints": "webhdfs://u@127.0.0.1:9/x"})
    assert str(_stopped(unreachable, ["requests.exceptions.ConnectionError: Read failed"], 1)) == (
        "training stopped: Read failed; no model was replaced, and the same command resumes if "
        "webhdfs://u@127.0.0.1:9/x, which can't be read now, holds a checkpoint"
    )


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(20)], epochs=1)
    folder = Path(str(spec.checkpoints))
    write_checkpoint(folder, Progress(ranks=2), {"x": torch.zeros(1)}, keep=1)
    with pytest.raises(TrailvecError, match="is from 2 processes, this run has 1: start 2"):
        train(spec)
    write_checkpoint(folder, Progress(ranks=1, epoch=2), {"x": torch.zeros(1)}, keep=1)
    state = folder / "00002-0000000000/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(TrailvecError, match=r"00002-0000000000 is damaged \(state\.safetensors is not the file"):
        train(spec)
    (folder / "00002-0000000000/checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(TrailvecError, match=r"00002-0000000000 is damaged \(maximum recursion depth exceeded"):
        train(spec)


def test_a_warm_start_begins_with_the_weights_of_its_base(tmp_path: Path) -> None:
    """At a rate that moves nothing: the base's weights, and new items whose own parts are zero."""
    rows = make_rows(60)
    train(make_run(tmp_path / "base", [rows], epochs=1, learning_rate=0.05))
    weights = tmp_path / "base/model/model.safetensors"
    new = next(row for row in rows if row["length"] == 5) | {"item_index": list(range(ITEMS, ITEMS + 5))}
    model = SPEC.model_copy(update={"items": ITEMS + 5})
    spec = make_run(tmp_path / "grown", [[*rows, new]], model=model, epochs=1, learning_rate=1e-12)
    train(spec.model_copy(update={"start_from": str(weights)}))
    base, grown = load_file(weights), load_file(tmp_path / "grown/model/model.safetensors")
    own = grown.pop("table.own.weight")
    torch.testing.assert_close(own, torch.cat([base["table.own.weight"], torch.zeros(5, 16)]), atol=1e-9, rtol=0)
    for name in grown.keys() - {"item_counts", "table.attributes"}:
        torch.testing.assert_close(grown[name], base[name], atol=1e-9, rtol=0)


def test_the_newest_checkpoints_and_the_best_epochs_stay(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        for step in (0, 12):
            best = min(epoch - 1, 2)
            progress = Progress(ranks=1, epoch=epoch, step=step, best_epoch=best)
            write_checkpoint(tmp_path, progress, {"x": torch.tensor([epoch, step])}, keep=2)
    # The best epoch was the second: its end is the third's beginning.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00003-0000000000",
        "00005-0000000000",
        "00005-0000000012",
    ]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    progress, tensors = read_checkpoint(newest)
    assert (progress.epoch, progress.step, tensors["x"].tolist()) == (5, 12, [5, 12])


def test_the_newest_checkpoint_is_that_of_the_last_epoch_beyond_99999_too(tmp_path: Path) -> None:
    for epoch in (99_999, 100_000):
        write_checkpoint(tmp_path, Progress(ranks=1, epoch=epoch), {"x": torch.zeros(1)}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["100000-0000000000"]


def test_what_an_older_checkpoint_calls_its_best_stays(tmp_path: Path) -> None:
    for ended, best in ((1, 1), (2, 1), (3, 3)):
        write_checkpoint(tmp_path, Progress(ranks=1, epoch=ended + 1, best_epoch=best), {"x": torch.zeros(1)}, keep=2)
    last, before, best_of_it = sorted((path.name for path in tmp_path.iterdir()), reverse=True)
    assert (last, before, best_of_it) == ("00004-0000000000", "00003-0000000000", "00002-0000000000")
    (tmp_path / before / "checkpoint.json").write_text("damaged")  # it stops no writing
    write_checkpoint(tmp_path, Progress(ranks=1, epoch=5, best_epoch=4), {"x": torch.zeros(1)}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [before, last, "00005-0000000000"]


def test_training_ends_when_validation_gets_no_better(tmp_path: Path) -> None:
    rows = make_rows(6, seed=4)
    settings = {"epochs": 9, "patience": 2, "learning_rate": 1e-12}  # so small a step changes nothing
    train(make_run(tmp_path, [make_rows(18)], (rows, [row["item_index"][-1:] for row in rows]), **settings))
    training = training_of(tmp_path)
    assert training["epochs"][0]["ndcg@10"] > 0
    assert (len(training["epochs"]), training["best_epoch"]) == (3, 1)


@pytest.mark.parametrize("patience", [0, 1])
def test_of_epochs_that_are_right_for_no_held_out_user_the_last_one_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """With few items, even one that is in no row is among the ten best by chance: here none is."""
    monkeypatch.setattr(validation, "best_items", lambda model, states, *_: torch.full((len(states), 10), -1))
    rows = make_rows(120)
    settings = {"epochs": 3, "patience": patience, "learning_rate": 0.02}
    train(make_run(tmp_path, [rows], (rows[:2], next_items(rows[:2])), **settings))
    training = training_of(tmp_path)
    assert [epoch["ndcg@10"] for epoch in training["epochs"]] == [0, 0, 0]
    assert training["best_epoch"] == 3


def test_validation_by_history_and_by_vertical(tmp_path: Path) -> None:
    dist.start()
    rows = make_rows(40, seed=5)
    targets = [[*items, 2 + number % 27] for number, items in enumerate(next_items(rows))]
    torch.manual_seed(1)
    counts = torch.from_numpy(item_counts(rows))
    known = counts.numpy() > 0
    model = build_model(SPEC, counts)
    verticals = np.arange(ITEMS) % 3 - 1  # of every three items one has no vertical
    held = read_held(write_valid(tmp_path, rows, targets), MAX_LENGTH - 1, known, 100)
    found = validate(model, held, known, 7, torch.device("cpu"), verticals, ["food", "rides"])

    expected: dict[str, list[float]] = {"all": [], "1-4": [], "5-19": [], "food": [], "rides": []}
    for row, wanted in zip(rows, targets, strict=True):
        batch = {name: torch.tensor([row[name][-(MAX_LENGTH - 1) :]]) for name in FEATURES}
        with torch.inference_mode():
            scores = (model.encode(batch) @ model.item_vectors().T)[0].numpy()
        ranked = sorted(np.flatnonzero(known).tolist(), key=lambda item: -scores[item])[:10]
        relevant = {item for item in wanted if known[item]}
        length = min(row["length"], MAX_LENGTH - 1)
        expected["all"].append(ndcg(ranked, relevant))
        expected["1-4" if length < 5 else "5-19"].append(ndcg(ranked, relevant))
        for place, name in enumerate(["food", "rides"]):
            if part := {item for item in relevant if verticals[item] == place}:
                expected[name].append(ndcg(ranked, part))
    assert found["ndcg@10"] == pytest.approx(np.mean(expected["all"]))
    groups = found["by_history"] | found["by_vertical"]
    assert {name: group["users"] for name, group in groups.items()} == {
        name: len(values) for name, values in expected.items() if name != "all"
    }
    for name, group in groups.items():
        assert group["ndcg@10"] == pytest.approx(np.mean(expected[name])), name


def test_validation_for_new_items_asks_for_and_ranks_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.start()
    rows = make_rows(3)
    for row in rows:
        row.update({name: [2, 3, 6] for name in FEATURES} | {"length": 3})
    files = write_valid(tmp_path, rows, [[2, 5], [2], [3]], seen=[[2, 3], [3], [3]])
    known = np.arange(ITEMS) > 1
    model: Any = SimpleNamespace(
        spec=SimpleNamespace(width=1), eval=lambda: None, item_vectors=lambda items: -items[:, None].float()
    )
    monkeypatch.setattr(
        "training.validation.fast_encoder", lambda model: lambda batch: torch.ones(len(batch["hour"]), 1)
    )

    def found(*, new_only: bool) -> dict[str, Any]:
        held = read_held(files, MAX_LENGTH - 1, known, 100, new_only=new_only)
        return validate(model, held, known, 7, torch.device("cpu"), np.zeros(ITEMS, np.int64), ["food"])

    # Of the first user's, 2 is a repeat, and 5 comes after 4. The second has only viewed 2. The third has nothing new.
    new = found(new_only=True)
    assert (new["by_vertical"]["food"]["users"], new["recall@10"]) == (2, 1)
    assert new["ndcg@10"] == pytest.approx((1 / math.log2(3) + 1) / 2)
    # All at 2, 3, 4, 5, ...: both of the first user's at 1 and 4, the second's at 1, the third's at 2.
    of_first = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert found(new_only=False)["ndcg@10"] == pytest.approx((of_first + 1 + 1 / math.log2(3)) / 3)
    train(make_run(tmp_path, [make_rows(5)], epochs=1).model_copy(update={"valid_files": files, "new_only": True}))
    assert training_of(tmp_path)["held_users"] == 2


def test_the_best_items_are_those_of_all_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.validation.ITEMS_AT_ONCE", 4)  # fewer than are asked for
    monkeypatch.setattr("training.validation.USERS_AT_ONCE", 3)
    torch.manual_seed(0)
    model = build_model(SPEC, torch.from_numpy(item_counts(make_rows(200)))).eval()
    states, items = torch.randn(8, SPEC.width), torch.arange(2, 29)
    excluded = [np.random.default_rng(user).integers(0, ITEMS, 9 - user) for user in range(8)]
    with torch.inference_mode():
        scores = states @ model.item_vectors().T
        expected = (scores[:, 2:29].argsort(dim=1, descending=True) + 2).tolist()
        nothing = np.empty(0, np.int64), np.zeros(9, np.int64)
        assert best_items(model, states, items, nothing).tolist() == [row[:10] for row in expected]
        found = best_items(model, states, items, flatten(excluded), k=25).tolist()
    for user, row in enumerate(expected):
        left = [item for item in row if item not in excluded[user]][:25]
        assert found[user] == left + [-1] * (25 - len(left))  # no excluded item where too few are left


def test_rows_that_ask_for_nothing_are_no_point_of_the_curve(tmp_path: Path) -> None:
    rows = make_rows(200)
    short, long = ([row for row in rows if (row["length"] == 1) == one] for one in (True, False))
    train(make_run(tmp_path, [short[:8] + long[:8]], batch_size=8, epochs=2))
    curve = json.loads((tmp_path / "model/model.json").read_text())["training"]["curve"]
    assert len(curve) == 2  # of four batches two are of single actions
    assert min(loss for _, loss in curve) > 1
    with pytest.raises(TrailvecError, match="no row in the train split of table sequences has a target that the model"):
        train(make_run(tmp_path / "nothing", [short], epochs=1))


def test_a_lines_loss_is_that_of_the_steps_since_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of all its targets: weighted by them, the lines give the epoch's loss. A batch of single actions has no line. The
    lines are also what is tracked."""
    targets: list[float] = []

    def step(run: Any, positions: float) -> None:
        targets.append(positions)
        _optimizer_step(run, positions)

    monkeypatch.setattr("training.loop._optimizer_step", step)
    monkeypatch.setattr("training.loop.SECONDS_BETWEEN_LINES", 0)
    train(make_run(tmp_path, [make_rows(60)], batch_size=4, epochs=2, learning_rate=0.05))
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    said = [[line["loss"] for line in lines if (line["event"], line["epoch"]) == ("step", epoch)] for epoch in (1, 2)]
    asked, epochs = np.array(targets).reshape(2, -1), training_of(tmp_path)["epochs"]
    for losses, counts, epoch in zip(said, asked, epochs, strict=True):
        assert counts.all()  # a step without targets moves nothing, whatever Horovod would give as gradients
        assert len(losses) == len(counts) < 15
        assert np.average(losses, weights=counts) == pytest.approx(epoch["loss"])
    tracker = Mock()
    listener = Listener(lambda text: None, tracker)
    for line in lines:
        listener(line)
    given = [call.args for call in tracker.metrics.call_args_list]
    assert [figures["loss"] for _, figures in given if "loss" in figures] == said[0] + said[1]


def test_the_best_epochs_weights_are_published(tmp_path: Path) -> None:
    """Not the last epoch's: all items are right for the held-out users, so that no epoch is better than the first."""
    valid = make_rows(3, 3), [list(range(2, 29))] * 3
    spec = make_run(tmp_path, [make_rows(40)], valid, epochs=2, learning_rate=0.01, keep_checkpoints=5)
    train(spec)
    first, last = (read_checkpoint(Path(str(spec.checkpoints)) / f"0000{n}-0000000000")[1] for n in (2, 3))
    published = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(tensor, first[f"model.{name}"]) for name, tensor in published.items())
    assert not torch.equal(published["table.own.weight"], last["model.table.own.weight"])
    shutil.rmtree(Path(str(spec.checkpoints)) / "00002-0000000000")
    with pytest.raises(TrailvecError, match=r"/00003-0000000000 names a best epoch whose .*, 00002-0000000000,"):
        train(spec)


@pytest.mark.parametrize("batch_size", [20, 10])  # its only step; the first of two, which would be kept
def test_a_model_that_breaks_is_neither_published_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    def break_it(run: Any, positions: float) -> None:
        run.others[-1].data.view(-1)[-1] = math.inf

    monkeypatch.setattr("training.loop._optimizer_step", break_it)
    minutes = 0 if batch_size == 10 else 10
    spec = make_run(tmp_path, [make_rows(20)], batch_size=batch_size, epochs=1, checkpoint_minutes=minutes)
    with pytest.raises(TrailvecError, match=r"parameters are not finite in epoch 1: lower train\.learning_rate"):
        train(spec)
    assert not list((tmp_path / "model").iterdir())
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_only_gpus_that_know_bfloat16_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert knows_bfloat16(torch.device("cuda", 0)) == expected
    assert not knows_bfloat16(torch.device("cpu"))


def test_gradients_are_scaled_together() -> None:
    parts = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.empty(0, 2), torch.tensor([4.0])]  # norm 5
    scale_gradients(parts, 2.0, 20.0)
    assert [part.tolist() for part in parts] == [[[6, 0], [0, 0]], [], [8]]
    scale_gradients(parts, 0.5, 1.0)
    assert parts[0].flatten().tolist() + parts[2].tolist() == pytest.approx([0.6, 0, 0, 0, 0.8])


def test_a_failing_rank_is_one_sentence_and_ends_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_run(tmp_path, [make_rows(5), make_rows(5)], processes=2)
    damage(spec.train_files[1])  # each rank reads one file, so one of them fails while the other waits for it
    # A file of a module's name in the folder where the command was started is not that module.
    (tmp_path / "torch.py").write_text("raise RuntimeError('no PyTorch')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))
    with pytest.raises(TrailvecError, match="training stopped: Couldn't deserialize thrift") as error:
        start(spec, tmp_path)
    assert processes_with(str(tmp_path / "run.json")) == []
    assert "\n" not in str(error.value)
    assert list((tmp_path / "model").iterdir()) == []


def test_bytes_that_are_no_text_are_heard_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who listened had ended at the first of them; a process that said more then waited for ever."""
    process = tmp_path / "process"
    process.write_text("#!/bin/sh\nprintf '\\377\\n{\"event\": 1}\\n'; printf 'OSError: no \\377\\n' >&2; exit 1\n")
    process.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(process))
    heard: list[Any] = []
    with pytest.raises(TrailvecError, match="training stopped: no \ufffd; no model was replaced"):
        launch(tmp_path / "run.json", make_run(tmp_path, [make_rows(5)]), heard.append)
    assert heard == [{"event": 1}]


def test_no_rank_outlives_a_killed_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile: who listens, and what the command lines tell, which everybody can read."""
    key = "only-in-the-environment" + 4_000 * " of a long class path"  # with the other more than one argument may have
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
    monkeypatch.setenv("SPARK_DIST_CLASSPATH", key)
    spec = make_run(tmp_path, [make_rows(50), make_rows(50)], processes=2, epochs=10_000, batch_size=2)
    (tmp_path / "run.json").write_text(spec.model_dump_json())
    script = f"""
from pathlib import Path
from jobs.launch_training import launch
from training.config import RunSpec
run = Path({str(tmp_path / "run.json")!r})
launch(run, RunSpec.model_validate_json(run.read_text()), lambda event: print(event["event"], flush=True))
"""
    stage = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    assert stage.stdout.readline() in ("step\n", "epoch\n")  # a step is told if two seconds have passed
    ranks = processes_with(str(tmp_path / "run.json"))
    assert len(ranks) >= 3  # the launcher and two ranks
    opened = [c for rank in ranks for c in psutil.Process(rank).net_connections() if c.status == psutil.CONN_LISTEN]
    assert opened
    assert {connection.laddr.ip for connection in opened} == {"127.0.0.1"}
    started = psutil.Process(stage.pid).children(recursive=True)
    assert {process.pid for process in started} > set(ranks)  # and the shells around them
    assert not [process for process in started if "only-in-the-environment" in " ".join(process.cmdline())]
    assert all(psutil.Process(rank).environ()["AWS_SECRET_ACCESS_KEY"] == key for rank in ranks)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    deadline = time.monotonic() + 60
    while processes_with(str(tmp_path / "run.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = processes_with(str(tmp_path / "run.json"))
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


def processes_with(argument: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if argument in (folder / "cmdline").read_text().split("\0") and state != "Z":
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_learning_rate_rises_then_falls() -> None:
    settings = TrainSettings(warm_up=0.05)
    assert schedule(settings, 0.025) == pytest.approx(0.5)  # half of the warm-up
    assert schedule(settings, 0.5) == pytest.approx(0.05 + 0.95 * 0.5)
    assert schedule(settings, 1.0) == pytest.approx(0.05)
    assert max(schedule(settings, step / 1000) for step in range(1001)) < 1


def test_learning_rate_grows_with_the_rows_in_a_step() -> None:
    def factor(scaling: str, processes: int) -> float:
        return rate_factor(TrainSettings.model_validate({"rate_scaling": scaling, "local_steps": 2}), processes)

    assert [factor(scaling, 8) for scaling in ("none", "sqrt")] == [1, 4]
    assert rate_factor(TrainSettings(), 1) == 1


def test_a_training_moves_by_the_scaled_and_scheduled_rate_and_as_configured(tmp_path: Path) -> None:
    def after(name: str, **settings: Any) -> str:
        train(make_run(tmp_path / name, [make_rows(40)], batch_size=4, local_steps=4, epochs=1, **settings))
        sha256: str = training_of(tmp_path / name)["parameters_sha256_by_rank"][0]
        return sha256

    scaled = after("sqrt", learning_rate=0.01, rate_scaling="sqrt")
    assert scaled == after("none", learning_rate=0.02, rate_scaling="none")
    assert scaled != after("unscaled", learning_rate=0.01, rate_scaling="none")
    for name, value in {"warm_up": 1, "clip_norm": 1e-6, "start": "random"}.items():
        assert scaled != after(name, learning_rate=0.01, rate_scaling="sqrt", **{name: value}), name


def test_last_words_are_the_cause() -> None:
    gone = "[0]<stderr>:horovod.common.exceptions.HorovodInternalError: the other rank is gone"
    lines = [
        gone,
        "[1]<stderr>:Traceback (most recent call last):",
        "[1]<stderr>:jobs.errors.TrailvecError: the loss is nan in epoch 1: lower train.learning_rate",
        "Process 1 exit with status code 1.",
        "Process 0 exit with status code 137.",
    ]
    assert last_words(lines, 1) == "the loss is nan in epoch 1: lower train.learning_rate"
    killed = last_words([gone, "Process 1 exit with status code 137.", "Process 0 exit with status code 1."], 1)
    assert killed.startswith("process 1 was killed by signal 9")
    launchers = "RuntimeError: Horovod detected that one or more processes exited with non-zero status"
    shut_down = "[0]<stderr>:RuntimeError: Horovod has been shut down. This was caused by an exception"
    assert last_words([gone, shut_down, launchers, "Process name: 1", "Exit code: 137"], 1).startswith("process 1 was")
    assert last_words([gone, launchers], 1) == "the other rank is gone"
    assert last_words([shut_down, launchers], 1) == "a process was lost, with its executor or its machine"
    assert last_words([gone, launchers, "Process name: 1", "Exit code: -1"], 1).startswith("a process was lost, with")
    place = "[/src/horovod/common/gloo/http_store.cc:54] "
    late = f"[0]<stderr>:  what():  {place}{place}Wait timeout after 300 seconds for key(s): 1. You may want to"
    lines = [late, "[0]<stderr>:Aborted", "[1]<stderr>:Terminated", launchers, "Process name: 0", "Exit code: 134"]
    assert last_words(lines, 1) == "Wait timeout after 300 seconds for key(s): 1. You may want to"
    assert last_words(lines[1:], 1) == "process 0 ended with code 134"
    assert last_words([gone, "[1]<stderr>:  what():  std::bad_alloc", *lines[1:]], 1) == "std::bad_alloc"
    assert last_words(["[0]<stderr>:no space", ""], 1) == "no space"
    assert last_words(["[0]<stderr>:see [1]<stderr>: above"], 1) == "see [1]<stderr>: above"
    head, call = "Traceback (most recent call last):", '  File "loop.py", line 3, in train'
    for cause, said in (("pyarrow.lib.ArrowInvalid: no Parquet", "no Parquet"), ("queue.Empty", "queue.Empty")):
        lines = [f"[0]<stderr>:{head}", *(f"[1]<stderr>:{line}" for line in (head, call, cause)), f"[0]<stderr>:{call}"]
        assert last_words([*lines, gone, shut_down, launchers], 1) == said
    lines = [f"[0]<stderr>:{line}" for line in (head, call, "Terminated")]
    assert last_words([*lines, "Process 1 exit with status code 137."], 1).startswith("process 1 was killed by signal")
    assert last_words([], -9).startswith("process 0 was killed by signal 9")
    crashed = last_words(["model.py:31: UserWarning: x", "  warnings.warn("], -11)
    assert crashed == "a process was ended by signal 11 (Segmentation fault)"
    assert last_words([], 3) == "exit code 3"


def test_a_line_on_stdout_within_a_traceback_on_stderr_is_not_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Horovod's launcher writes to both when it ends: stdout, which it buffers, after its traceback's first lines."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        """#!/bin/sh
        echo 'Traceback (most recent call last):' >&2
        sleep 0.2
        echo 'Process 1 exit with status code 137.'
        echo 'Process 0 exit with status code 143.'
        sleep 0.2
        echo 'RuntimeError: Horovod detected that one or more processes exited with non-zero status' >&2
        exit 1"""
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    with pytest.raises(TrailvecError, match="training stopped: process 1 was killed by signal 9"):
        launch(tmp_path / "run.json", make_run(tmp_path, [make_rows(5)]), print)


def test_a_line_that_a_kill_cut_short_is_no_event() -> None:
    line = '[0]<stdout>:{"event": "epoch", "loss": 2.5}'
    assert parse_event(line) == {"event": "epoch", "loss": 2.5}
    assert parse_event(line[:-3]) is None
    assert parse_event("a word") is None


def test_what_tasks_of_spark_are_given_and_why_there_were_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_run(tmp_path, [make_rows(5)], threads=3)
    given: list[dict[str, str]] = []

    def run_in_spark(function: object, arguments: object, processes: int, environment: dict, hear: Callable) -> None:
        given.append(environment)
        hear("[0]<stderr>:horovod.common.exceptions.HorovodInternalError: the other rank is gone")
        raise Exception("Timed out waiting for tasks to start")

    monkeypatch.setattr(dist, "run_in_spark", run_in_spark)
    with pytest.raises(TrailvecError, match=r"training stopped: Timed out waiting for tasks to start; no model"):
        launch_in_spark(spec, print)
    # A file of a module's name in the folder where an executor works is not that module.
    assert given == [{"OMP_NUM_THREADS": "3", "PYTHONSAFEPATH": "1"}]


def test_the_first_of_many_processes_to_fail_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in_spark(function: object, arguments: object, processes: int, environment: object, hear: Callable) -> None:
        hear("[9]<stderr>:OSError: the disk is gone")
        for rank in range(64):
            for _ in range(30):
                hear(f"[{rank}]<stderr>:  File loop.py, line 1, in train")
            hear(f"[{rank}]<stderr>:horovod.common.exceptions.HorovodInternalError: another rank is gone")
        raise RuntimeError("Horovod detected that one or more processes exited")

    monkeypatch.setattr(dist, "run_in_spark", run_in_spark)
    with pytest.raises(TrailvecError, match="training stopped: the disk is gone;"):
        launch_in_spark(make_run(tmp_path, [make_rows(5)]), print)


def test_a_python_without_pytorch_is_one_sentence() -> None:
    """As the one of the data stages, on a cluster's driver or in an executor's Python worker."""
    here = ModuleNotFoundError("No module named 'torch'")
    there = RuntimeError("...worker.py\nModuleNotFoundError: No module named 'horovod.torch'\n\tat org.apache.spark...")
    for error, name in ((here, "torch"), (there, "horovod")):
        assert str(explain(error)).startswith(
            f"{name} is not installed in the Python that runs this stage: training and scoring"
        )


def test_a_small_log_is_passed_over_more_often() -> None:
    settings = TrainSettings(epochs=3, min_steps=100, batch_size=10, processes=2)  # 20 rows in a step
    assert [epochs(settings, rows) for rows in (1, 20, 21, 980, 1000, 100_000)] == [100, 100, 50, 3, 3, 3]
