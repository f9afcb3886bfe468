"""The device of a training process. No GPU is needed: Horovod and CUDA are said to be there."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from horovod.runner.common.util import network
from horovod.torch import Compression

from jobs.errors import TrailvecError
from jobs.train import Listener, progress_line
from training import dist


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two processes on a machine with two GPUs."""
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"init": None, "nccl_built": 1, "rank": 1, "size": 2}.items():
        monkeypatch.setattr(f"horovod.torch.{name}", lambda value=value: value)
    # Both see the same.
    monkeypatch.setattr("horovod.torch.allgather_object", lambda value, name: [value, value])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "3")
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "300")
    return monkeypatch


@pytest.mark.parametrize("library", [None, "knows nothing"])
def test_each_process_of_a_machine_has_its_gpu(machine: pytest.MonkeyPatch, library: str | None) -> None:
    """Where CUDA's driver does not say which they are, too."""
    driver = Driver([b"A" * 16, b"B" * 16]) if library is None else object()
    machine.setattr("ctypes.CDLL", lambda name: driver)
    assert dist.start() == torch.device("cuda", 1)
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr("ctypes.CDLL", lambda name: Driver([b"A" * 16]) if library is None else driver)
    with pytest.raises(TrailvecError, match=r"processes, but no GPU is left for process 1 \(it sees 1\): lower"):
        dist.start()


class Driver:
    """CUDA's, with GPUs of these UUIDs."""

    def __init__(self, uuids: list[bytes]) -> None:
        self.uuids = uuids

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.uuids)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        uuid.raw = self.uuids[device.value]
        return 0


def test_processes_that_each_see_one_gpu_of_a_machine_have_their_own(machine: pytest.MonkeyPatch) -> None:
    """As YARN's containers do: for each it is the first. Nobody has one where another process sees none."""
    machine.setattr("ctypes.CDLL", lambda name: Driver([b"B" * 16]))
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr("horovod.torch.allgather_object", lambda value, name: [[b"A".hex() * 16], value])
    assert dist.start() == torch.device("cuda", 0)
    machine.setattr("horovod.torch.allgather_object", lambda value, name: [[], value])
    assert dist.start() == torch.device("cpu")


@pytest.mark.parametrize(
    ("seen", "own"),
    [
        ([["A", "B"], ["A", "B"]], [0, 1]),  # one machine
        ([["A"], ["B"]], [0, 0]),  # each its own
        ([["A", "B"], ["C", "D"], ["A", "B"], ["D", "C"]], [0, 0, 1, 0]),  # two machines, another order
        ([["A"], ["A"], ["B"]], [0, None, 0]),  # one too many
        ([["A"], [], ["A"]], [0, None, None]),  # one sees none
    ],
)
def test_no_gpu_belongs_to_two_processes(seen: list[list[str]], own: list[int | None]) -> None:
    assert [dist.own_gpu(seen, rank) for rank in range(len(seen))] == own


def test_rank_0_says_who_sees_no_gpu(machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine.setattr("horovod.torch.allgather_object", lambda value, name: [["A"], []])
    machine.setattr("horovod.torch.rank", lambda: 0)
    assert dist.start() == torch.device("cpu")
    said = progress_line(json.loads(capsys.readouterr().out))
    assert said == "trains on the CPU: some processes (1) see no GPU, others do"


def test_an_epochs_line_has_its_figures() -> None:
    epoch = {"event": "epoch", "epoch": 2, "epochs": 5, "share": 0.5, "loss": 1.25, "ndcg@10": 0.125}
    epoch |= {"rows_per_second": 12345.6, "padding": 0.25, "data_wait": 0.031, "seconds_left": 125.4}
    assert progress_line(epoch) == (
        "epoch 2/5  50%  loss 1.2500  ndcg@10 0.1250  12,346 rows/s  padding 25%  data wait 3%  2:05 left"
    )


def test_a_line_of_steps_has_the_mean_loss_since_the_line_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=2)
    monkeypatch.setattr("jobs.train.time", Mock(monotonic=lambda: next(seconds)))
    lines: list[str] = []
    tracker = Mock()
    listener = Listener(lines.append, tracker)
    step = {"event": "step", "epoch": 1, "epochs": 1, "share": 0.5, "rows_done": 9, "rows_per_second": 1.0}
    step |= {"padding": 0.0, "data_wait": 0.0, "seconds_left": 0.0}
    for number in range(12):  # lines at 0 and 12 seconds
        listener(step | {"loss": 60.0 if number == 3 else 5.0})
    listener(step | {"event": "epoch", "loss": 9.5})
    assert [line.split("loss ")[1].split()[0] for line in lines] == ["5.0000", f"{(60 + 5 * 5) / 6:.4f}", "9.5000"]
    assert [of.args[1]["loss"] for of in tracker.metrics.call_args_list[2:5]] == [5.0, 60.0, 5.0]


def test_gpus_that_horovod_knows_nothing_of_are_left_alone(
    machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.setattr("horovod.torch.nccl_built", lambda: 0)
    assert dist.start() == torch.device("cpu")
    assert capsys.readouterr().out == ""  # rank 0 speaks
    machine.setattr("horovod.torch.rank", lambda: 0)
    assert dist.start() == torch.device("cpu")
    assert "trains on the CPU: Horovod was built without NCCL" in progress_line(json.loads(capsys.readouterr().out))


def test_a_machine_without_gpus_has_nothing_to_say(
    machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr("horovod.torch.rank", lambda: 0)
    assert dist.start() == torch.device("cpu")
    assert capsys.readouterr().out == ""


def test_ranks_wait_five_minutes_for_each_other_or_as_long_as_they_are_told(machine: pytest.MonkeyPatch) -> None:
    machine.delenv("HOROVOD_GLOO_TIMEOUT_SECONDS", raising=False)
    dist.start()
    assert os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "300"
    machine.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "9")
    dist.start()
    assert os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "9"


@pytest.mark.parametrize("fp16", [False, True])
def test_gradients_are_exchanged_in_16_bits_where_that_is_asked_for(machine: pytest.MonkeyPatch, fp16: bool) -> None:
    asked: list[Any] = []
    sent: list[torch.Tensor] = []

    def distribute(optimizer: Any, *, compression: Any, **_: object) -> None:
        asked.append(compression)

    def allgather(part: torch.Tensor, name: str) -> torch.Tensor:
        sent.append(part)
        return part

    machine.setattr("horovod.torch.broadcast_parameters", lambda state, root_rank: None)
    machine.setattr("horovod.torch.DistributedOptimizer", distribute)
    machine.setattr("horovod.torch.allgather_async", allgather)
    machine.setattr("horovod.torch.synchronize", lambda handle: handle)
    model = torch.nn.Linear(2, 2)
    dist.distribute(model, torch.optim.AdamW(model.parameters()), local_steps=1, fp16=fp16)
    assert asked == [Compression.fp16 if fp16 else Compression.none]
    _, values = dist.sum_rows(torch.tensor([1, 4]), torch.ones(2, 3), count=5, fp16=fp16)
    assert [part.dtype for part in sent] == [torch.int64, torch.float16 if fp16 else torch.float32]
    assert values.dtype == torch.float32


# What Spark says of a job, by Py4J; the thread in which Horovod runs it prints it, and nobody else knows it.
ABORTED = "An error occurred while calling z:org.apache.spark.api.python.PythonRDD.collectAndServe.\n: "
ABORTED += "org.apache.spark.SparkException: Job aborted due to stage failure: "
LOST_TASK = "Task 0 in stage 1.0 failed 1 times, most recent failure: Lost task 0.0 in stage 1.0 (host driver): "
IN_PYTHON = "org.apache.spark.api.python.PythonException: Traceback (most recent call last):\n  File ...\n"


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (
            "Total size of results (2 GiB) is bigger than x\n\tat org...",
            "^Job aborted .*: Total size .* bigger than x$",
        ),
        (LOST_TASK + "org.apache.spark.SparkException: Python worker crashed\n\tat org...", "^Python worker crashed$"),
        (LOST_TASK + IN_PYTHON + "ValueError: no such place\nbehind it\n\tat org...", "^no such place$"),
        (
            LOST_TASK + IN_PYTHON + "ModuleNotFoundError: No module named 'horovod'\n\tat",
            "^horovod is not installed in the Python",
        ),
    ],
)
def test_a_failed_job_of_spark_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], says: str, told: str
) -> None:
    def run_spark() -> None:
        raise RuntimeError(ABORTED + says)

    def run(*_: object, **__: object) -> None:
        failing = threading.Thread(target=run_spark)  # its name ends with the function's
        failing.start()
        failing.join()
        raise Exception("Spark job has failed, see the error above.")

    monkeypatch.setattr("horovod.spark.run", run)
    monkeypatch.setattr("pyspark.SparkContext.getOrCreate", lambda: SimpleNamespace(master="yarn"))
    with pytest.raises(RuntimeError, match=told):
        dist.run_in_spark(print, (), 2, {}, print)
    assert capsys.readouterr().err == ""


def test_the_driver_does_not_wait_for_a_machine_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, nics: object, **__: object) -> list[list[int]]:
        assert nics is None  # other machines are not met over this one's own loopback
        with network.socket.socket(network.socket.AF_INET, network.socket.SOCK_STREAM) as asking:
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            after = [asking.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
            return [[asking.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *after]]

    monkeypatch.setattr("horovod.spark.run", run)
    monkeypatch.setattr("pyspark.SparkContext.getOrCreate", lambda: SimpleNamespace(master="yarn"))
    assert dist.run_in_spark(print, (), 2, {}, print) == [[1, 60, 10, 6]]
    assert network.socket is socket
