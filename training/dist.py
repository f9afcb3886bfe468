"""Processes that train together: the only module that imports Horovod.

One process is the same code with size 1; it needs no launcher.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch


def start() -> None:
    """Joins the processes that the launcher started; without a launcher this one is alone."""
    hvd.init()


def rank() -> int:
    """This process's number, 0 to size() - 1."""
    return int(hvd.rank())


def size() -> int:
    """How many processes train together."""
    return int(hvd.size())


def distribute(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer whose gradients are **summed** over all processes; every process begins with rank 0's state.

    The caller divides the loss by the count over all processes, so that the sum is the mean over all of them,
    also where they hold different numbers of examples. All processes take part.
    """
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), op=hvd.Sum)


def total(values: list[float]) -> list[float]:
    """Each value summed over all processes. All processes take part."""
    return list(hvd.allreduce(torch.tensor(values, dtype=torch.float64), op=hvd.Sum, name="total").tolist())


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks. All processes take part."""
    return list(hvd.allgather_object(value, name="gather"))
