"""Trains one model. `trailvec train` writes the run spec and starts this, once per process:

    python -m training.horovodrun --gloo -np 2 -H localhost:2 python -m training.loop RUN_SPEC.json
    python -m training.loop RUN_SPEC.json            # one process

or, with train.launcher = "spark", `train_in_executor` in the tasks of a Spark application.

Every process reads its own rows and computes its own gradients. The gradients are summed, so a step with N processes
is a step with an N times larger batch. Rank 0 writes checkpoints and the model, and logs to stdout: one JSON object per
line, whose `event` is `without_gpus`, `left`, `resumed`, `step` or `epoch`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.errors import TrailvecError
from training import dist
from training.arrays import Bool, Float64, Int64
from training.batches import FEATURES
from training.checkpoint import (
    Progress,
    best_checkpoint,
    checkpoints,
    describe_weights,
    load_optimizer,
    optimizer_tensors,
    part_of,
    read_checkpoint,
    read_progress,
    read_tensors,
    save_weights,
    write_checkpoint,
)
from training.config import RunSpec, TrainSettings
from training.data import Batch, Held, padding, read_batches, read_held, rows_digest, to_device
from training.model import SequenceModel, build_model
from training.rowwise import RowWiseAdam
from training.start import MAX_ITEMS, item_factors
from training.stores import Folder, folder_of, local_file, remove_abandoned, remove_tree
from training.validation import validate

FINAL_RATE = 0.05  # of the learning rate, reached at the end along a cosine
MAX_HELD_USERS = 10_000
SECONDS_BETWEEN_LINES = 2.0
CURVE_POINTS = 50  # in an epoch
# Summed over steps and ranks.
SUMS = (
    "rows",  # of `sequences`
    "positions",  # targets that the model knows
    "loss",  # over all positions
    "places",  # cells of the batches' item matrices
    "padding",  # those of them without an action
    "waited",  # seconds of `busy` that a rank spent waiting for data
    "busy",  # seconds that a rank's steps took
)
ROWS, POSITIONS, LOSS, _, _, _, BUSY = range(len(SUMS))


@dataclass
class _Run:
    """One process's training state.

    Attributes:
        folder: of the checkpoints; None: none are written.
        items: the item table's row-wise optimizer; None: `optimizer` updates the table too.
        others: the parameters that `optimizer` updates.
        random: the state of torch's generator when the checkpoint was written.
        held, held_users: this rank's share of the held-out users (None if there are none), and all ranks' count.
        mine: this rank's SUMS in the current epoch; `progress.sums` are those of all ranks.
        logged: `progress.sums` when the last `step` of the epoch was logged.
        logged_at, saved_at: when this rank last logged, and last took part in a checkpoint (time.monotonic).
    """

    spec: RunSpec
    device: torch.device
    folder: Folder | None
    model: SequenceModel
    items: RowWiseAdam | None
    others: list[torch.nn.Parameter]
    optimizer: Any  # Horovod's DistributedOptimizer has no type
    progress: Progress
    random: torch.Tensor
    held: Held | None
    held_users: int
    known: Bool
    item_verticals: Int64
    mine: Float64
    logged: Float64
    logged_at: float
    saved_at: float

    @property
    def learning_rate(self) -> float:
        """Of the current step, whose rows `progress.rows_done` already includes."""
        settings = self.spec.settings
        done = self.progress.rows_done / (settings.epochs * self.spec.train_rows)
        return settings.learning_rate * rate_factor(settings, dist.size()) * schedule(settings, done)


def _keep_freed_memory() -> None:
    """Each step allocates and frees the same large blocks. By default the C library returns them to the system and asks
    for fresh pages: a fifth of a step with a full softmax (docs/sizing.md). Only glibc has these options (mallopt(3)).
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)  # take large blocks from the heap too
        mallopt(m_trim_threshold, 2**31 - 1)


def train(spec: RunSpec) -> None:
    """Trains, validates after each epoch, and writes the best epoch's model. All ranks call it.

    Resumes from the newest checkpoint in `spec.checkpoints`, if there is one. On CPUs the result is then bit for bit
    that of an uninterrupted run (docs/decisions/0009).

    Raises:
        TrailvecError: the loss or a parameter is not finite, a checkpoint is damaged or of another number of
            processes, the train split has no target that the model knows, or there is no GPU left for this process.
    """
    # Adam's squares of tiny gradients become denormal, which makes CPUs several times slower. Threads inherit this
    # flag when they start, so set it before the first one.
    torch.set_flush_denormal(True)
    device = dist.start()
    if device.type == "cpu":
        _keep_freed_memory()
    torch.set_num_threads(spec.settings.threads)
    checkpoint, progress = _resumed_from(spec)
    patience = spec.settings.patience
    batches = _batches(spec, progress, progress.epoch)  # whose first rows are read while the model is set up
    try:
        run = _begin(spec, device, checkpoint, progress)
        for epoch in range(progress.epoch, spec.settings.epochs + 1):
            # All ranks hold the same values, so they decide alike. Without held-out users the last epoch is the best.
            if patience and epoch - 1 - progress.best_epoch >= patience:
                break
            _train_epoch(run, epoch, batches)
            if epoch < spec.settings.epochs:
                batches = _batches(spec, progress, epoch + 1)  # whose first rows are read while this one is validated
            _close_epoch(run, epoch)
    finally:
        batches.close()
    if dist.rank() == 0:
        training = {
            "processes": dist.size(),
            "device": device.type,
            "epochs": progress.history,
            "planned_epochs": spec.settings.epochs,
            "best_epoch": progress.best_epoch,
            "curve": progress.curve,
            "held_users": run.held_users,
            "seconds": sum(epoch["seconds"] for epoch in progress.history),
            "parameters_sha256_by_rank": progress.best_sha256,
        }
        describe_weights(Path(spec.output), spec.model, {**spec.about, "training": training})


def _resumed_from(spec: RunSpec) -> tuple[Folder | None, Progress]:
    """The newest checkpoint (None: there is none), and its progress, or that of a new run.

    Raises:
        TrailvecError: the checkpoint is damaged or of another number of processes.
    """
    size = dist.size()
    folder = folder_of(spec.checkpoints) if spec.checkpoints else None
    rows_sha256 = rows_digest(spec.train_files)
    checkpoint = dist.from_first(_checkpoint_over(rows_sha256, folder) if folder and dist.rank() == 0 else None)
    progress = read_progress(checkpoint)[0] if checkpoint else Progress(ranks=size)
    if progress.ranks != size:  # only if started by hand: to `trailvec train`, another number is another model
        raise TrailvecError(
            f"the checkpoint {checkpoint} is from {progress.ranks} processes, this run has {size}: "
            f"start {progress.ranks}"
        )
    progress.rows_sha256 = rows_sha256
    return checkpoint, progress


def _begin(spec: RunSpec, device: torch.device, checkpoint: Folder | None, progress: Progress) -> _Run:
    """Sets up this rank: the same initial weights on all ranks, or those of the checkpoint, which every rank reads.

    Raises:
        TrailvecError: the checkpoint is damaged.
    """
    settings, rank, size = spec.settings, dist.rank(), dist.size()
    torch.manual_seed(settings.seed)
    item_counts = torch.from_numpy(np.load(spec.item_counts))
    attributes = torch.from_numpy(np.load(spec.item_attributes)) if spec.item_attributes else None
    model = build_model(spec.model, item_counts, attributes)
    known = item_counts.numpy() > 0
    tensors = read_checkpoint(checkpoint)[1] if checkpoint else {}
    if checkpoint:
        model.load_state_dict(part_of(tensors, "model."))
    else:
        _first_weights(model, spec, known)
    model.to(device)
    own = model.table.own.weight
    items = RowWiseAdam(own, weight_decay=settings.weight_decay, seed=settings.seed) if spec.model.sparse else None
    others = [parameter for parameter in model.parameters() if items is None or parameter is not own]
    optimizer = torch.optim.AdamW(others, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = dist.distribute(model, optimizer, settings.local_steps, settings.fp16_gradients)

    length, files = spec.model.history_length, spec.valid_files
    held = read_held(files, length, known, MAX_HELD_USERS, new_only=spec.new_only) if files else None
    verticals = np.load(spec.item_verticals, mmap_mode="r") if spec.item_verticals else np.full(len(known), -1)
    run = _Run(
        spec=spec,
        device=device,
        folder=folder_of(spec.checkpoints) if spec.checkpoints else None,
        model=model,
        items=items,
        others=others,
        optimizer=optimizer,
        progress=progress,
        random=torch.get_rng_state(),
        held=None if held is None else held.part(rank, size),
        held_users=0 if held is None else len(held.offsets) - 1,
        known=known,
        item_verticals=verticals,
        mine=np.zeros(len(SUMS)),
        logged=np.zeros(len(SUMS)),
        logged_at=time.monotonic(),
        saved_at=time.monotonic(),
    )
    if checkpoint:
        _restore(run, checkpoint, tensors)
    return run


def _first_weights(model: SequenceModel, spec: RunSpec, known: Bool) -> None:
    """The initial weights where there is no checkpoint: an older model's, or random ones with item vectors from an SVD,
    as the spec says."""
    if spec.start_from:
        with local_file(folder_of(spec.start_from)) as weights:
            model.grow_from(read_tensors(weights))
    elif dist.rank() == 0 and spec.settings.start == "svd" and len(known) <= MAX_ITEMS:
        # The other ranks get the factors from the broadcast in dist.distribute.
        factors = item_factors(spec.train_files, known, spec.model.width, spec.settings.seed)
        model.start_from(torch.from_numpy(factors))


def _restore(run: _Run, checkpoint: Folder, tensors: dict[str, torch.Tensor]) -> None:
    """Loads the rest of the checkpoint, all but the model's weights. Rank 0 also writes the best epoch's weights to
    `spec.output`, and logs `resumed`."""
    load_optimizer(run.model, run.optimizer, part_of(tensors, "optimizer."))
    if run.items:
        run.items.load_tensors(part_of(tensors, "items."))
    run.random = tensors[f"rng.{dist.rank()}"].clone()  # a view would keep the model-sized file in memory
    if dist.rank() == 0:
        progress = run.progress
        if progress.best_epoch:
            _publish_best(run.spec, checkpoint, best_checkpoint(checkpoint.parent, progress))
        _log_event("resumed", epoch=progress.epoch, step=progress.step, rows_done=progress.rows_done)


def _checkpoint_over(rows_sha256: str, folder: Folder) -> Folder | None:
    """Rank 0: the newest checkpoint that can be resumed over these rows (training.data.rows_digest).

    A checkpoint from inside an epoch over other files is removed: which rows its steps have consumed depends on the
    order of those files. Leftovers of a process killed a day ago or earlier are removed too.
    """
    remove_abandoned(folder)
    for checkpoint in reversed(checkpoints(folder)):
        progress, _ = read_progress(checkpoint)
        if progress.step == 0 or progress.rows_sha256 == rows_sha256:
            return checkpoint
        remove_tree(checkpoint)
        _log_event("left", epoch=progress.epoch, step=progress.step)
    return None


def _publish_best(spec: RunSpec, checkpoint: Folder, best: Folder) -> None:
    """Rank 0: writes the best epoch's weights so far to `spec.output`, from `best`, the one that `checkpoint` names.

    Raises:
        TrailvecError: `best` is gone or damaged.
    """
    try:
        tensors = read_checkpoint(best)[1]
    except TrailvecError:
        raise TrailvecError(
            f"the checkpoint {checkpoint} names a best epoch whose checkpoint, {best.name}, is gone or damaged: "
            f"restore it, or remove {checkpoint.name} too, and training resumes from the one before it"
        ) from None
    save_weights(Path(spec.output), part_of(tensors, "model."))


def _batches(spec: RunSpec, progress: Progress, epoch: int) -> Generator[Batch, None, None]:
    """This rank's batches of an epoch, without those that a resumed epoch has had. Their reading begins at once."""
    settings = spec.settings
    return read_batches(
        spec.train_files,
        max_length=spec.model.max_length,
        batch_size=settings.batch_size,
        rank=dist.rank(),
        size=dist.size(),
        seed=_seed(settings, epoch),
        # Other objectives predict no later session, so their rows keep session_end as it is when they are encoded.
        later_share=settings.later_share if spec.model.objective == "clm" else 0.0,
        horizon=settings.horizon,
        target_types=spec.target_event_types,
        skip=progress.step * settings.local_steps if epoch == progress.epoch else 0,
        shuffle_baskets=settings.shuffle_baskets,
    )


def _seed(settings: TrainSettings, epoch: int) -> int:
    return settings.seed + 1000 * epoch


def _train_epoch(run: _Run, epoch: int, batches: Iterator[Batch]) -> None:
    """The remaining steps of an epoch. A rank that runs out of rows continues with empty steps until all have.

    Raises:
        TrailvecError: the loss or a parameter is not finite.
    """
    spec, settings, progress, rank = run.spec, run.spec.settings, run.progress, dist.rank()
    run.model.train()
    # From here on, each rank draws its own negatives and dropout.
    torch.manual_seed(_seed(settings, epoch) + rank)
    if progress.step:
        torch.set_rng_state(run.random)
        run.mine = np.array(progress.rank_sums[rank])
    else:
        run.mine = np.zeros(len(SUMS))
        progress.sums = progress.curve_sums = run.mine.tolist()
    run.logged = np.array(progress.sums)
    types = spec.target_event_types
    target_types = None if types is None else torch.tensor(types, device=run.device)
    stepped = time.monotonic()
    while True:
        run.optimizer.zero_grad()
        sums = add_gradients(run.model, batches, settings, run.device, target_types)
        now = time.monotonic()
        sums[BUSY], stepped = now - stepped, now
        due = run.folder is not None and rank == 0 and now - run.saved_at > 60 * settings.checkpoint_minutes
        *sums_of_all, someone_is_due = dist.total([*sums.tolist(), float(due)])
        step = dict(zip(SUMS, sums_of_all, strict=True))
        if step["rows"] == 0:
            return
        if not math.isfinite(step["loss"]):
            raise TrailvecError(f"the loss is {step['loss']} in epoch {epoch}: lower train.learning_rate")
        progress.rows_done += step["rows"]
        if step["positions"]:  # else Horovod would give zeros as gradients, by which Adam moves on
            _optimizer_step(run, step["positions"])

        run.mine += sums
        progress.step += 1
        progress.sums = (np.array(progress.sums) + sums_of_all).tolist()
        _extend_curve(progress, spec.train_rows)
        if rank == 0 and now - run.logged_at > SECONDS_BETWEEN_LINES:
            _log_step(run, now)
        if someone_is_due:  # only rank 0's clock counts
            _refuse_broken(run.model, epoch)
            _save(run)


def _optimizer_step(run: _Run, positions: float) -> None:
    """Updates the parameters by the mean gradient over all ranks' `positions` targets."""
    settings = run.spec.settings
    run.optimizer.synchronize()
    gradients = [parameter.grad for parameter in run.others if parameter.grad is not None]
    if run.items:
        rows, of_rows = dist.sum_rows(*run.items.take_gradient(), run.spec.model.items, settings.fp16_gradients)
        gradients.append(of_rows)
    scale_gradients(gradients, _scale(settings) / positions, settings.clip_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate
    with run.optimizer.skip_synchronize():
        run.optimizer.step()
    if run.items:
        run.items.step(rows, of_rows, run.learning_rate)


def _extend_curve(progress: Progress, train_rows: int) -> None:
    """Adds the mean loss since the curve's last point, once enough rows have been read since then."""
    since = np.array(progress.sums) - progress.curve_sums
    if since[ROWS] >= train_rows / CURVE_POINTS and since[POSITIONS] > 0:  # one-action rows have no target
        progress.curve.append([progress.rows_done, _loss(since)])
        progress.curve_sums = progress.sums


def _log_step(run: _Run, now: float) -> None:
    """Rank 0: logs `step`, if there was a target since the last one. Its loss is that of the steps since then: the
    epoch's mean would hide a spike."""
    sums = np.array(run.progress.sums)
    since = sums - run.logged
    if since[POSITIONS] > 0:
        run.logged_at, run.logged = now, sums
        figures = {**_figures(run.spec, run.progress), "loss": _loss(since)}
        _log_event("step", **figures, learning_rate=run.learning_rate)


def _close_epoch(run: _Run, epoch: int) -> None:
    """Validates (each rank its share of the users; the sums are reduced), keeps the best weights, writes a checkpoint.

    Raises:
        TrailvecError: a parameter is not finite, or no row had a target that the model knows.
        RuntimeError: the ranks' parameters differ.
    """
    spec, progress, rank, size = run.spec, run.progress, dist.rank(), dist.size()
    started = time.monotonic()
    if not progress.curve:  # the same on all ranks
        remedy = "" if spec.target_event_types is None else " or correct sequences.target_event_types"
        raise TrailvecError(
            "no row in the train split of table sequences has a target that the model knows, so there is nothing to "
            f"learn: lower vocabulary.min_count{remedy}"
        )
    _refuse_broken(run.model, epoch)
    scores: dict[str, Any] = {}
    if run.held is not None:
        of_verticals = run.item_verticals, spec.verticals
        batch_size = spec.settings.batch_size
        scores = validate(run.model, run.held, run.known, batch_size, run.device, *of_verticals)
    everyone, by_rank = dict(zip(SUMS, progress.sums, strict=True)), dist.gather(run.mine)
    progress.history.append(
        {
            **_figures(spec, progress),
            "loss_by_rank": [_loss(sums) for sums in by_rank],
            "rows_by_rank": [int(sums[ROWS]) for sums in by_rank],
            "positions": int(everyone["positions"]),
            "seconds": everyone["busy"] / size + time.monotonic() - started,
            **scores,
        }
    )
    if rank == 0:
        _log_event("epoch", **progress.history[-1])
    # Of epochs that place no held-out item among the first ten, as few users may ask for, the last one: an epoch 1 that
    # is kept for its zero, or that ends a patient training, would be worse than none held out.
    if (score := scores.get("ndcg@10", float(epoch))) > progress.best or score == progress.best == 0:
        # The best weights go straight to the output folder: a copy in memory would be as large as the model. They must
        # be the same on all ranks.
        progress.best, progress.best_epoch, progress.best_sha256 = score, epoch, dist.gather(digest(run.model))
        if len(set(progress.best_sha256)) > 1:
            raise RuntimeError(f"the ranks have different parameters: {progress.best_sha256}")
        if rank == 0:
            save_weights(Path(spec.output), run.model.tensors())
    progress.epoch, progress.step = epoch + 1, 0
    if run.folder:
        _save(run)


def _refuse_broken(model: SequenceModel, epoch: int) -> None:
    """Checks the parameters before they are saved: no loss has been computed since the last step. All ranks call it,
    and all raise.

    Raises:
        TrailvecError: a parameter is not finite.
    """
    ends = (torch.stack(torch.aminmax(p.detach())) for p in model.parameters() if p.numel())  # copies no table
    broken = sum(not bool(pair.isfinite().all()) for pair in ends)
    if dist.total([float(broken)])[0]:
        raise TrailvecError(f"parameters are not finite in epoch {epoch}: lower train.learning_rate")


def train_in_executor(run: str, arrays: dict[str, bytes]) -> dict[str, bytes]:
    """`train`, called by Horovod in a process that a Spark task starts, on a machine that need not see the driver's
    folders.

    Args:
        run: the RunSpec as JSON. Every executor must see its data files and checkpoints; its `output` is ignored.
        arrays: the bytes of its .npy files (`item_counts`, `item_attributes`, `item_verticals`), used instead of its
            paths.

    Returns:
        Rank 0: the model's files, by name. Other ranks: nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in arrays.items():
            (Path(folder) / name).write_bytes(content)
        output = Path(folder) / "model"
        output.mkdir()
        places = {"output": str(output), **{name: str(Path(folder) / name) for name in arrays}}
        train(RunSpec.model_validate_json(run).model_copy(update=places))
        return {path.name: path.read_bytes() for path in output.iterdir()} if dist.rank() == 0 else {}


def add_gradients(
    model: SequenceModel,
    batches: Iterator[Batch],
    settings: TrainSettings,
    device: torch.device,
    target_types: torch.Tensor | None,
) -> Float64:
    """Accumulates the gradients of the next `local_steps` batches (fewer at the end): of their summed loss / `_scale`.
    `target_types`: see SequenceModel.loss.

    Returns:
        The batches' SUMS, float64 [7], with `busy` left at 0.
    """
    rows = positions = places = empty = 0
    waited, loss_sum = 0.0, torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(settings.local_steps):
        started = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - started
        if batch is None:
            break
        of_padding, of_all = padding(batch)
        rows, places, empty = rows + len(batch[FEATURES[0]]), places + of_all, empty + of_padding
        with torch.autocast(device.type, torch.bfloat16, enabled=knows_bfloat16(device)):
            loss, targets = model.loss(to_device(batch, device), target_types)
        if targets > 0:
            (loss / _scale(settings)).backward()  # type: ignore[no-untyped-call]
            positions, loss_sum = positions + targets, loss_sum + loss.detach()
    return np.array([rows, positions, float(loss_sum), places, empty, waited, 0.0])


def knows_bfloat16(device: torch.device) -> bool:
    """Whether to compute in bfloat16: on GPUs since Ampere (8.0). Older ones emulate it, slower than 32 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def scale_gradients(gradients: list[torch.Tensor], factor: float, largest: float) -> None:
    """Multiplies the gradients by `factor`, then clips their global norm to `largest`. In place."""
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norm = factor * float(torch.linalg.vector_norm(norms))
    for gradient in gradients:
        gradient.mul_(factor * min(1.0, largest / max(norm, 1e-6)))


def rate_factor(settings: TrainSettings, processes: int) -> float:
    """The learning rate's multiple of that of one process with one batch per step."""
    return math.sqrt(processes * settings.local_steps) if settings.rate_scaling == "sqrt" else 1.0


def schedule(settings: TrainSettings, progress: float) -> float:
    """The share of the learning rate after `progress` (0 to 1) of all rows: linear warm-up, then cosine decay."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return min(progress / settings.warm_up, FINAL_RATE + (1 - FINAL_RATE) * cosine)


def digest(model: SequenceModel) -> str:
    """SHA-256 of all parameters."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.tensors().items()):
        sha256.update(name.encode())
        sha256.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # a view: no copy of a table
    return sha256.hexdigest()


def _save(run: _Run) -> None:
    """Rank 0 writes a checkpoint, with each rank's sums and generator state. All ranks call it."""
    by_rank = dist.gather((run.mine.tolist(), torch.get_rng_state().numpy().tobytes()))
    if dist.rank() == 0 and run.folder:
        run.progress.rank_sums = [sums for sums, _ in by_rank]
        random = {
            f"rng.{rank}": torch.frombuffer(bytearray(state), dtype=torch.uint8)
            for rank, (_, state) in enumerate(by_rank)
        }
        learnt = {f"model.{name}": tensor for name, tensor in run.model.tensors().items()}
        moments = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(run.model, run.optimizer).items()}
        if run.items:
            moments |= {f"items.{name}": tensor for name, tensor in run.items.tensors().items()}
        keep = run.spec.settings.keep_checkpoints
        write_checkpoint(run.folder, run.progress, {**learnt, **moments, **random}, keep)
    run.saved_at = time.monotonic()


def _scale(settings: TrainSettings) -> float:
    """A constant near the expected number of targets. Dividing the loss by it keeps gradients within 16-bit range;
    `_optimizer_step` multiplies it back."""
    return float(settings.batch_size * settings.local_steps * 16)


def _loss(sums: Float64) -> float:
    """The mean loss per position."""
    return float(sums[LOSS] / max(sums[POSITIONS], 1))


def _figures(spec: RunSpec, progress: Progress) -> dict[str, Any]:
    """The current epoch's figures for the log."""
    epoch = dict(zip(SUMS, progress.sums, strict=True))
    seconds = epoch["busy"] / progress.ranks
    all_seconds = seconds + sum(e["seconds"] for e in progress.history)
    rows_left = spec.settings.epochs * spec.train_rows - progress.rows_done
    return {
        "epoch": progress.epoch,
        "epochs": spec.settings.epochs,
        "share": epoch["rows"] / spec.train_rows,
        "rows_done": int(progress.rows_done),
        "loss": _loss(np.array(progress.sums)),
        "rows_per_second": epoch["rows"] / max(seconds, 1e-9),
        "padding": epoch["padding"] / max(epoch["places"], 1),
        "data_wait": epoch["waited"] / max(epoch["busy"], 1e-9),
        "seconds_left": all_seconds * rows_left / max(progress.rows_done, 1),
    }


def _log_event(event: str, **figures: Any) -> None:
    print(json.dumps({"event": event, **figures}), flush=True)


if __name__ == "__main__":
    train(RunSpec.model_validate_json(Path(sys.argv[1]).read_text("utf-8")))
