"""Distributed training: the only module that imports Horovod, except for its launcher (training/horovodrun.py).

A single process runs the same code with size 1 and needs no launcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import horovod.torch as hvd
import torch

from jobs.errors import TrailvecError, explain, first_line
from training.rowwise import summed


def start() -> torch.device:
    """Joins the processes that the launcher started (without a launcher: this one alone), and returns this process's
    device: a GPU of its own; or the CPU, if any process sees no GPU or Horovod was built without NCCL.

    Raises:
        TrailvecError: there is no GPU left for this process.
    """
    gpus = torch.cuda.is_available()
    cuda = gpus and bool(hvd.nccl_built())  # without NCCL, Horovod exchanges tensors through the CPU's memory only
    if not cuda:
        # How often, in ms, a Horovod thread negotiates with the others what to exchange. Its default of 1 ms costs a
        # process that computes on one core 20 ms of a step of 66 (docs/what-did-not-work.md).
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "3")
    # How long Gloo waits for the others, now and at each exchange: within its default of 30 s, a busy or cold machine
    # may not even have imported PyTorch. A killed process closes its sockets, so nobody waits for it.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "300")
    hvd.init()
    seen = gather(_gpus() if cuda else [])  # collective: before any process returns or raises
    if not all(seen):
        if rank() == 0 and (gpus or any(seen)):
            without = [number for number, of_rank in enumerate(seen) if not of_rank] if any(seen) else []
            print(json.dumps({"event": "without_gpus", "ranks": without}), flush=True)
        return torch.device("cpu")
    number = own_gpu(seen, rank())
    if number is None:
        raise TrailvecError(
            f"train.processes asks for {size()} processes, but no GPU is left for process {rank()} (it sees "
            f"{len(seen[rank()])}): lower train.processes, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("high")  # TF32 for the products that are not in bfloat16
    return torch.device("cuda", number)


def own_gpu(seen: list[list[str]], rank: int) -> int | None:
    """The index of this rank's GPU among those that it sees: each rank takes the first that no lower rank took. None:
    there is none left.

    Args:
        seen: the names of the GPUs that each rank sees. A machine's ranks may each see all its GPUs, or only their own.
    """
    taken: set[str | None] = set()
    for gpus in seen[: rank + 1]:
        free = next((gpu for gpu in gpus if gpu not in taken), None)
        taken.add(free)
    return None if free is None else seen[rank].index(free)


def _gpus() -> list[str]:
    """The UUIDs of the GPUs (or MIG instances) that this process sees, in CUDA's order, which is PyTorch's. Hostname
    and number, if the driver gives no UUIDs."""

    def check(code: int) -> None:
        if code != 0:
            raise OSError(f"CUDA's driver failed with code {code}")

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        count, device, uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
        check(cuda.cuInit(0))
        check(cuda.cuDeviceGetCount(ctypes.byref(count)))
        uuids = []
        for number in range(count.value):
            check(cuda.cuDeviceGet(ctypes.byref(device), number))
            check(cuda.cuDeviceGetUuid_v2(uuid, device))
            uuids.append(uuid.raw.hex())
        return uuids
    except (OSError, AttributeError):  # no such library, or an older one without the function
        return [f"{socket.gethostname()} {number}" for number in range(torch.cuda.device_count())]


def rank() -> int:
    """This process's number, 0 to size() - 1."""
    return int(hvd.rank())


def size() -> int:
    """How many processes train together."""
    return int(hvd.size())


def distribute(model: torch.nn.Module, optimizer: torch.optim.Optimizer, local_steps: int, fp16: bool) -> Any:
    """The optimizer, with gradients **summed** over all processes and over `local_steps` backward passes. It may hold
    only some of the model's parameters; the gradients of the others stay local.

    Every process starts with rank 0's weights. The optimizer has no state yet, so there is none to broadcast (and
    Horovod's broadcast_optimizer_state would create it by a step with zero gradients, which decays the weights). A
    process may do fewer than `local_steps` backward passes before synchronize(), even none. Collective.
    """
    bits = {torch.bfloat16: torch.int16}  # Horovod doesn't know bfloat16: send its bits
    state = {name: tensor.view(bits.get(tensor.dtype, tensor.dtype)) for name, tensor in model.state_dict().items()}
    hvd.broadcast_parameters(state, root_rank=0)
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=[named for named in model.named_parameters() if named[1] in optimized],
        op=hvd.Sum,
        backward_passes_per_step=local_steps,
        compression=hvd.Compression.fp16 if fp16 else hvd.Compression.none,
    )


def sum_rows(rows: torch.Tensor, values: torch.Tensor, count: int, fp16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows of all processes, sorted, int64 [m], and their summed values, float32 [m, width]: bit for bit
    the same on every process. Collective.

    Horovod's own exchange of sparse gradients sends a row as often as it was used, never in 16 bits, and mistakes the
    missing gradient of a process without rows for a dense one.

    Args:
        rows: int64 [n], numbers below `count`, each once; a process may have none.
        values: float32 [n, width].
        fp16: send the values as 16-bit numbers.
    """
    if size() == 1:
        return rows, values
    sent = values.half() if fp16 else values
    waiting = [hvd.allgather_async(part, name=name) for part, name in ((rows, "rows"), (sent, "values of rows"))]
    rows, received = (hvd.synchronize(handle) for handle in waiting)  # in rank order
    return summed(rows, received, count)


def total(values: list[float]) -> list[float]:
    """Each value summed over all processes. Collective."""
    if size() == 1:  # Horovod would wait for its next cycle
        return values
    return list(hvd.allreduce(torch.tensor(values, dtype=torch.float64), op=hvd.Sum, name="total").tolist())


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order. Collective."""
    return list(hvd.allgather_object(value, name="gather"))


def from_first(value: Any) -> Any:
    """Rank 0's value. Collective."""
    return hvd.broadcast_object(value, root_rank=0, name="from_first")


class _Lines:
    """A stream that passes each line to `hear`. Horovod copies each rank's output in a thread of its own, in blocks (64
    KB, or the rest when the rank ends)."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear
        self._rest: dict[int, str] = {}  # each thread's incomplete last line

    def write(self, text: str) -> None:
        thread = threading.get_ident()
        *lines, self._rest[thread] = (self._rest.get(thread, "") + text).split("\n")
        for line in lines:
            self._hear(line)

    def flush(self) -> None:
        pass


def run_in_spark(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    processes: int,
    environment: dict[str, str],
    hear: Callable[[str], None],
) -> list[Any]:
    """Runs `function` on each rank, a process started by a task of the active Spark application; returns all results.

    Args:
        function: a module-level function, which the executors import.
        hear: called with each line that a rank writes to stdout or stderr, from several threads, and late: Horovod
            delivers lines in blocks of 64 KB, or when the rank ends.

    Raises:
        Exception: Horovod's own, if a rank failed or the tasks did not start within two minutes; if the Spark job
            failed, a RuntimeError with its cause.
    """
    import horovod.spark  # noqa: PLC0415 - it needs pyspark, which a training process need not have
    from pyspark import SparkContext  # noqa: PLC0415

    from training.horovodrun import kept_alive, on_loopback  # noqa: PLC0415

    # All on this machine: no other has to reach Horovod's servers, one of which asks for no credentials.
    local = str(SparkContext.getOrCreate().master).startswith("local")
    loopback = {name for _, name in socket.if_nameindex() if name.startswith("lo")}
    with _hooks_restored() as of_job, kept_alive(), on_loopback() if local else nullcontext():
        try:
            return list(
                horovod.spark.run(
                    function,
                    args=arguments,
                    num_proc=processes,
                    use_gloo=True,
                    env=environment,
                    stdout=_Lines(hear),
                    stderr=_Lines(hear),
                    start_timeout=120,
                    verbose=0,
                    nics=loopback if local else None,
                    executable=os.environ.get("PYSPARK_PYTHON"),  # the executors' interpreter
                )
            )
        except Exception as error:
            if of_job and "see the error above" in str(error):
                raise RuntimeError(_why_a_job_failed(of_job[0])) from of_job[0]
            raise


def _why_a_job_failed(error: BaseException) -> str:
    """One line out of Spark's long error: the Python exception if there is one, else Java's."""
    text = str(error)
    match = re.search(r"^[\w.]*(?:Error|Exception): (.+)", text, re.MULTILINE)
    match = match or re.search(r".*(?:Error|Exception): (.+)", text)
    return explain(error) or (match[1] if match else first_line(error))


@contextmanager
def _hooks_restored() -> Iterator[list[BaseException]]:
    """Restores the hooks that Horovod replaces in this process when the block ends. Errors of Horovod's Spark thread,
    pages of Java, go into the yielded list instead of stderr."""
    # Horovod installs its own handlers of Ctrl-C and SIGTERM and does not restore ours.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    print_error = threading.excepthook
    unprinted: list[BaseException] = []

    def print_others(failed: threading.ExceptHookArgs) -> None:
        if "(run_spark)" not in getattr(failed.thread, "name", ""):
            print_error(failed)
        elif failed.exc_value:
            unprinted.append(failed.exc_value)

    threading.excepthook = print_others
    try:
        yield unprinted
    finally:
        threading.excepthook = print_error
        for number, handler in handlers.items():
            signal.signal(number, handler)
