"""The loop in real processes, started as `trailvec train` starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jobs.errors import TrailvecError
from jobs.train import last_words, launch
from tests.sequence_files import make_rows, make_run
from training.config import RunSpec, TrainSettings
from training.loop import learning_rate, train


def start(spec: RunSpec, folder: Path) -> list[str]:
    run_file = folder / "run.json"
    run_file.write_text(spec.model_dump_json())
    said: list[str] = []
    launch(run_file, spec, said.append)
    return said


def test_two_ranks_step_like_one_with_all_their_rows(tmp_path: Path) -> None:
    # Unequal ranks, one row group for both: the mean must be over all positions, not over ranks.
    rows = make_rows(49)
    parts = [rows]
    two = make_run(tmp_path / "two", parts, processes=2, batch_size=50, epochs=3, learning_rate=0.05)
    one = make_run(tmp_path / "one", parts, processes=1, batch_size=50, epochs=3, learning_rate=0.05)
    said = start(two, tmp_path / "two")
    train(one)

    assert [line[:9] for line in said] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    after = {
        name: json.loads((tmp_path / name / "model/model.json").read_text())["training"] for name in ("one", "two")
    }
    assert sorted(after["two"]["epochs"][0]["rows_by_rank"]) == [24, 25]
    assert after["one"]["epochs"][0]["rows_by_rank"] == [49]
    losses = {name: [epoch["loss"] for epoch in training["epochs"]] for name, training in after.items()}
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["two"][2] < losses["two"][0]
    two_tensors, one_tensors = (load_file(tmp_path / name / "model/model.safetensors") for name in ("two", "one"))
    for name, tensor in one_tensors.items():
        assert (two_tensors[name] - tensor).abs().max() < 1e-3, name


def test_a_failing_rank_is_one_sentence_and_ends_the_other(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(5), make_rows(5)], processes=2)
    with pytest.raises(TrailvecError, match=r"training stopped: .*no-such\.npy") as error:
        start(spec.model_copy(update={"item_counts": str(tmp_path / "no-such.npy")}), tmp_path)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "model").iterdir()) == []


def test_no_rank_outlives_a_killed_stage(tmp_path: Path) -> None:
    spec = make_run(tmp_path, [make_rows(50), make_rows(50)], processes=2, epochs=10_000, batch_size=2)
    (tmp_path / "run.json").write_text(spec.model_dump_json())
    script = f"""
from pathlib import Path
from jobs.train import launch
from training.config import RunSpec
run = Path({str(tmp_path / "run.json")!r})
launch(run, RunSpec.model_validate_json(run.read_text()), lambda text: print(text, flush=True))
"""
    stage = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    assert stage.stdout.readline().startswith("epoch 1/")
    ranks = processes_with(str(tmp_path / "run.json"))
    assert len(ranks) >= 3  # the launcher and two ranks
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
    settings = TrainSettings(learning_rate=2.0)
    assert learning_rate(settings, 0.025) == pytest.approx(1.0)  # half of the warm-up
    assert learning_rate(settings, 0.5) == pytest.approx(2.0 * (0.05 + 0.95 * 0.5))
    assert learning_rate(settings, 1.0) == pytest.approx(0.1)
    assert max(learning_rate(settings, step / 1000) for step in range(1001)) < 2.0


def test_last_words_are_the_cause() -> None:
    lines = [
        "[1]<stderr>:Traceback (most recent call last):",
        "[1]<stderr>:jobs.errors.TrailvecError: the loss is nan in epoch 1: lower train.learning_rate",
        "[0]<stderr>:horovod.common.exceptions.HorovodInternalError: the other rank is gone",
        "Process 1 exit with status code 1.",
    ]
    assert last_words(lines, 1) == "the loss is nan in epoch 1: lower train.learning_rate"
    assert last_words(["[0]<stderr>:Killed", ""], 137) == "Killed"
    assert last_words([], 137) == "exit code 137"
