"""The device of a training process. No GPU is needed: Horovod and CUDA are said to be there."""

from __future__ import annotations

import json

import pytest
import torch

from jobs.errors import TrailvecError
from jobs.train import progress_line
from training import dist


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two processes on a machine with two GPUs."""
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"init": None, "nccl_built": 1, "rank": 1, "local_rank": 1, "local_size": 2}.items():
        monkeypatch.setattr(f"horovod.torch.{name}", lambda value=value: value)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "3")
    return monkeypatch


def test_each_process_of_a_machine_has_its_gpu(machine: pytest.MonkeyPatch) -> None:
    assert dist.start() == torch.device("cuda", 1)
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrailvecError, match="asks for 2 processes on a machine with 1 GPUs: lower it"):
        dist.start()


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
