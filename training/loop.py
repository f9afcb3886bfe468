"""Trains one model. `trailvec train` writes the run spec and starts this, once per process:

    horovodrun --gloo -np 2 -H localhost:2 python -m training.loop RUN_SPEC.json
    python -m training.loop RUN_SPEC.json            # one process

or, with train.launcher = "spark", `train_in_executor` in the tasks of a Spark application.

Every process reads its own row groups and computes its own gradients; the gradients are summed, so that a step
with N processes is a step with an N times larger batch. Rank 0 writes checkpoints and the model, and speaks: one JSON
object on each line of stdout, whose `event` is `resumed`, `step` or `epoch`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.errors import TrailvecError
from training import dist
from training.batches import FEATURES
from training.checkpoint import (
    Progress,
    best_checkpoint,
    describe_weights,
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    part_of,
    read_checkpoint,
    read_tensors,
    save_weights,
    write_checkpoint,
)
from training.config import RunSpec, TrainSettings
from training.data import Batch, Held, read_batches, read_held, to_batch
from training.metrics import HISTORY_FROM, class_names, rank_metrics
from training.model import SequenceModel, build_model
from training.rowwise import RowWiseAdam
from training.start import MAX_ITEMS, item_factors
from training.stores import Folder, folder_of, local_file

FINAL_RATE = 0.05  # of the learning rate, reached at the end along a cosine
MAX_HELD_USERS = 10_000
ITEMS_AT_ONCE, USERS_AT_ONCE = 16_384, 256  # in validation: 16 MB of scores, however large the catalogue is
SECONDS_BETWEEN_LINES = 2.0
CURVE_POINTS = 50  # in an epoch
# What is summed over steps and ranks. Places: cells of the batches' item matrices, padding: those that hold no action;
# waited: seconds that a rank waited for its data, of the `busy` seconds that its steps took.
SUMS = ("rows", "positions", "loss", "places", "padding", "waited", "busy")


def train(spec: RunSpec) -> None:  # noqa: PLR0912, PLR0915 - one flat loop in reading order
    """Trains, validates after each epoch, and writes the best epoch's model. All ranks call it.

    Where `spec.checkpoints` holds a checkpoint, goes on from the newest. On CPUs the result is then bit for bit that of
    a run without a stop (docs/decisions/0009).

    Raises:
        TrailvecError: the loss is not finite, or the checkpoint is damaged or of another number of processes.
    """
    settings = spec.settings
    # Adam's squares of tiny gradients end below the smallest normal number, with which CPUs are several times slower.
    # Threads inherit it: before the first of them.
    torch.set_flush_denormal(True)
    device = dist.start()
    rank, size = dist.rank(), dist.size()
    torch.set_num_threads(settings.threads)

    # ---- the same first weights everywhere, or those of the newest checkpoint, which all ranks read
    torch.manual_seed(settings.seed)
    item_counts = torch.from_numpy(np.load(spec.item_counts))
    attributes = torch.from_numpy(np.load(spec.item_attributes)) if spec.item_attributes else None
    model = build_model(spec.model, item_counts, attributes)
    known = item_counts.numpy() > 0
    item_verticals = np.load(spec.item_verticals, mmap_mode="r") if spec.item_verticals else np.full(len(known), -1)
    folder = folder_of(spec.checkpoints) if spec.checkpoints else None
    found = dist.from_first(newest_checkpoint(folder) if folder and rank == 0 else None)
    progress, tensors = read_checkpoint(found) if found else (Progress(ranks=size), {})
    if progress.ranks != size:
        raise TrailvecError(
            f"the checkpoint {found} is of {progress.ranks} processes, this run has {size}: "
            f"set train.processes = {progress.ranks}, or remove {folder} to begin anew"
        )
    if found:
        model.load_tensors(part_of(tensors, "model."))
    elif spec.start_from:
        with local_file(folder_of(spec.start_from)) as weights:
            model.grow_from(read_tensors(weights))
    elif rank == 0 and settings.start == "svd" and len(known) <= MAX_ITEMS:
        # The other ranks get it with the first weights, from the broadcast in dist.distribute.
        model.start_from(torch.from_numpy(item_factors(spec.train_files, known, spec.model.width, settings.seed)))
    model.to(device)
    own = model.table.own.weight
    items = RowWiseAdam(own, weight_decay=settings.weight_decay, seed=settings.seed) if spec.model.sparse else None
    others = [parameter for parameter in model.parameters() if items is None or parameter is not own]
    optimizer = torch.optim.AdamW(others, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = dist.distribute(model, optimizer, settings.local_steps, settings.fp16_gradients)
    if found and folder:
        load_optimizer(model, optimizer, part_of(tensors, "optimizer."))
        if items:
            items.load_tensors(part_of(tensors, "items."))
        if rank == 0:
            if progress.best_epoch:
                best = read_checkpoint(best_checkpoint(folder, progress))[1]
                save_weights(Path(spec.output), part_of(best, "model."))
                del best
            _say("resumed", epoch=progress.epoch, step=progress.step, rows_done=progress.rows_done)

    random = tensors.get(f"rng.{rank}", torch.get_rng_state()).clone()
    del tensors  # with them the file goes, which is as large as the model

    held = read_held(spec.valid_files, spec.model.history_length, known, MAX_HELD_USERS) if spec.valid_files else None
    held_part = held.part(rank, size) if held is not None else None
    rate = settings.learning_rate * rate_factor(settings, size)
    said = saved = time.monotonic()
    for epoch in range(progress.epoch, settings.epochs + 1):
        # Decided from what all ranks have alike. Without held-out users the last epoch is always the best.
        if settings.patience and epoch - 1 - progress.best_epoch >= settings.patience:
            break
        # ---- one pass over the rows; a rank that has run out goes on with empty steps until all have
        model.train()
        seed = settings.seed + 1000 * epoch
        torch.manual_seed(seed + rank)  # from here on each rank draws its own negatives and dropout
        mine, everyone = np.zeros(len(SUMS)), np.zeros(len(SUMS))
        if progress.step:
            torch.set_rng_state(random)
            mine, everyone = np.array(progress.rank_sums[rank]), np.array(progress.sums)
        else:
            progress.curve_sums = everyone.tolist()
        batches = read_batches(
            spec.train_files,
            max_length=spec.model.max_length,
            batch_size=settings.batch_size,
            rank=rank,
            size=size,
            seed=seed,
            later_share=settings.later_share,
            horizon=settings.horizon,
            skip=progress.step * settings.local_steps,
            shuffle_baskets=settings.shuffle_baskets,
        )
        stepped = time.monotonic()
        while True:
            optimizer.zero_grad()
            sums = add_gradients(model, batches, settings, device)
            now = time.monotonic()
            sums[-1], stepped = now - stepped, now
            due = folder is not None and rank == 0 and now - saved > 60 * settings.checkpoint_minutes
            *sums_of_all, someone_is_due = dist.total([*sums, float(due)])
            step = dict(zip(SUMS, sums_of_all, strict=True))
            if step["rows"] == 0:
                break
            if not math.isfinite(step["loss"]):
                raise TrailvecError(f"the loss is {step['loss']} in epoch {epoch}: lower train.learning_rate")
            optimizer.synchronize()
            gradients = [parameter.grad for parameter in others if parameter.grad is not None]
            if items:
                rows, of_rows = dist.sum_rows(*items.take_gradient(), spec.model.items, settings.fp16_gradients)
                gradients.append(of_rows)
            scale_gradients(gradients, _scale(settings) / max(step["positions"], 1), settings.clip_norm)
            progress.rows_done += step["rows"]
            now_at = progress.rows_done / (settings.epochs * spec.train_rows)
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(settings, now_at)
            with optimizer.skip_synchronize():
                optimizer.step()
            if items:
                items.step(rows, of_rows, optimizer.param_groups[0]["lr"])

            mine += sums
            everyone += sums_of_all
            progress.step += 1
            progress.sums = everyone.tolist()
            if everyone[0] - progress.curve_sums[0] >= spec.train_rows / CURVE_POINTS:
                progress.curve.append([progress.rows_done, _loss(everyone - progress.curve_sums)])
                progress.curve_sums = progress.sums
            if rank == 0 and now - said > SECONDS_BETWEEN_LINES:
                said = now
                _say("step", **_figures(spec, progress), learning_rate=optimizer.param_groups[0]["lr"])
            if folder and someone_is_due:  # only rank 0's clock counts
                _save(folder, progress, model, optimizer, items, mine=mine, keep=settings.keep_checkpoints)
                saved = time.monotonic()

        # ---- validation: each rank ranks its part of the users, the sums meet
        started = time.monotonic()
        scores: dict[str, Any] = {}
        if held_part is not None:
            parts = item_verticals, spec.verticals
            scores = validate(model, held_part, known, settings.batch_size, device, *parts, new_only=spec.new_only)
        by_rank = dist.gather(mine)
        progress.history.append(
            {
                **_figures(spec, progress),
                "loss_by_rank": [_loss(sums) for sums in by_rank],
                "rows_by_rank": [int(sums[0]) for sums in by_rank],
                "positions": int(everyone[1]),
                "seconds": everyone[-1] / size + time.monotonic() - started,
                **scores,
            }
        )
        if rank == 0:
            _say("epoch", **progress.history[-1])
        if (score := scores.get("ndcg@10", float(epoch))) > progress.best:
            # The best weights go where they are published from, not into a second copy in memory. They are the same on
            # all ranks, or something is badly wrong.
            progress.best, progress.best_epoch, progress.best_sha256 = score, epoch, dist.gather(digest(model))
            if len(set(progress.best_sha256)) > 1:
                raise RuntimeError(f"the ranks have different parameters: {progress.best_sha256}")
            if rank == 0:
                save_weights(Path(spec.output), model.tensors())
        progress.epoch, progress.step = epoch + 1, 0
        if folder:
            _save(folder, progress, model, optimizer, items, mine=mine, keep=settings.keep_checkpoints)
            saved = time.monotonic()

    if rank == 0:
        training = {
            "processes": size,
            "device": device.type,
            "epochs": progress.history,
            "planned_epochs": settings.epochs,
            "best_epoch": progress.best_epoch,
            "curve": progress.curve,
            "held_users": len(held.offsets) - 1 if held is not None else 0,
            "seconds": sum(epoch["seconds"] for epoch in progress.history),
            "parameters_sha256_by_rank": progress.best_sha256,
        }
        describe_weights(Path(spec.output), spec.model, {**spec.about, "training": training})


def train_in_executor(run: str, arrays: dict[str, bytes]) -> dict[str, bytes]:
    """`train`, called by Horovod beside a Spark task, on a machine that need not see the driver's folders.

    Args:
        run: the RunSpec as JSON. Its data files and its checkpoints have to be where every executor sees them; its
            `output` is not used.
        arrays: the bytes of its .npy files (`item_counts`, `item_attributes`, `item_verticals`): they take the place
            of its paths.

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
    model: SequenceModel, batches: Iterator[Batch], settings: TrainSettings, device: torch.device
) -> npt.NDArray[np.float64]:
    """Adds to the gradients those of the next `local_steps` batches (or of those that are left): of their summed loss,
    divided by `_scale`.

    Returns:
        The batches' SUMS, float64 [7], without the busy seconds.
    """
    rows = positions = places = padding = 0
    waited, loss_sum = 0.0, torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(settings.local_steps):
        asked = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - asked
        if batch is None:
            break
        items = batch[FEATURES[0]]
        rows, places, padding = rows + len(items), places + items.numel(), padding + int((items == 0).sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, targets = model.loss(_to_device(batch, device))
        if targets > 0:
            (loss / _scale(settings)).backward()  # type: ignore[no-untyped-call]
            positions, loss_sum = positions + targets, loss_sum + loss.detach()
    return np.array([rows, positions, float(loss_sum), places, padding, waited, 0.0])


def scale_gradients(gradients: list[torch.Tensor], factor: float, largest: float) -> None:
    """Multiplies the gradients by the factor, and where their common norm is then above `largest`, down to that."""
    if not gradients:  # a step of rows that ask for nothing
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norm = factor * float(torch.linalg.vector_norm(norms))
    for gradient in gradients:
        gradient.mul_(factor * min(1.0, largest / max(norm, 1e-6)))


def rate_factor(settings: TrainSettings, processes: int) -> float:
    """By how much the learning rate of a step exceeds that of one process with one batch per step."""
    larger = processes * settings.local_steps
    return {"sqrt": math.sqrt(larger), "linear": float(larger), "none": 1.0}[settings.rate_scaling]


def schedule(settings: TrainSettings, progress: float) -> float:
    """The share of the learning rate after `progress` (0 to 1) of all rows: a linear warm-up, then a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return min(progress / settings.warm_up, FINAL_RATE + (1 - FINAL_RATE) * cosine)


@torch.inference_mode()
def validate(  # noqa: PLR0917 - all of it is what is ranked
    model: SequenceModel,
    held: Held,
    known: npt.NDArray[np.bool_],
    batch_size: int,
    device: torch.device,
    item_verticals: npt.NDArray[np.int64],
    verticals: list[str],
    *,
    new_only: bool = False,
) -> dict[str, Any]:
    """Recall@10 and NDCG@10 of the next item over all known items: means over all ranks' users, over those with
    histories of similar length (`by_history`), and over those with a next item of a vertical (`by_vertical`; what they
    took next of other verticals does not count there). `item_verticals`: see RunSpec. Empty without users."""
    model.eval()
    states = torch.empty((held.actions.shape[1], model.spec.width), device=device)
    for start in range(0, len(states), batch_size):
        batch = to_batch(torch.from_numpy(held.actions[:, start : start + batch_size]))
        states[start : start + batch_size] = model.encode(_to_device(batch, device))
    own = torch.from_numpy(held.actions[0]).long().to(device) if new_only else None
    top_items = best_items(model, states, torch.from_numpy(np.flatnonzero(known)).to(device), own).cpu().numpy()
    metrics = rank_metrics(top_items, held.targets, held.offsets)
    classes = np.searchsorted(HISTORY_FROM, (held.actions[0] > 0).sum(axis=1), side="right") - 1
    sums = [_metric_sums(metrics, np.ones(len(classes), bool))]
    sums += [_metric_sums(metrics, classes == number) for number in range(len(HISTORY_FROM))]
    owners = np.repeat(np.arange(len(classes)), np.diff(held.offsets))
    for number in range(len(verticals)):
        chosen = item_verticals[held.targets] == number
        offsets = np.concatenate([[0], np.bincount(owners[chosen], minlength=len(classes)).cumsum()])
        found = rank_metrics(top_items, held.targets[chosen], offsets)
        sums.append(_metric_sums(found, np.diff(offsets) > 0))
    users, recall, ndcg = np.array(dist.total(np.concatenate(sums).tolist())).reshape(-1, 3).T.tolist()
    means = [
        {"users": int(n), "recall@10": r / n, "ndcg@10": g / n} if n else None
        for n, r, g in zip(users, recall, ndcg, strict=True)
    ]
    everyone, of_class, of_vertical = means[0], means[1 : 1 + len(HISTORY_FROM)], means[1 + len(HISTORY_FROM) :]
    if everyone is None:
        return {}
    return {
        "recall@10": everyone["recall@10"],
        "ndcg@10": everyone["ndcg@10"],
        "by_history": {name: found for name, found in zip(class_names(HISTORY_FROM), of_class, strict=True) if found},
        "by_vertical": {name: found for name, found in zip(verticals, of_vertical, strict=True) if found},
    }


def best_items(
    model: SequenceModel, states: torch.Tensor, items: torch.Tensor, excluded: torch.Tensor | None, k: int = 10
) -> torch.Tensor:
    """The items that score best with each state, the best first, int64 [users, at most k].

    Neither the scores nor the vectors of all items are ever in memory.

    Args:
        states: float32 [users, width].
        items: int64 [n], in order: those that are ranked.
        excluded: int64 [users, any]: items that are not ranked for that user; None: there are none.
    """
    k = min(k, len(items))
    best = torch.full((len(states), k), -torch.inf, device=states.device)
    best_of = torch.zeros((len(states), k), dtype=torch.int64, device=states.device)
    for some in torch.split(items, ITEMS_AT_ONCE):
        vectors = model.item_vectors(some).T
        for start in range(0, len(states), USERS_AT_ONCE):
            users = slice(start, start + USERS_AT_ONCE)
            scores = states[users] @ vectors  # in 32 bits: 16 would make ties
            if excluded is not None:
                place = torch.searchsorted(some, excluded[users]).clamp_(max=len(some) - 1)
                user, column = (some[place] == excluded[users]).nonzero(as_tuple=True)
                scores[user, place[user, column]] = -torch.inf
            found = scores.topk(min(k, len(some)), dim=1)
            best[users], kept = torch.cat([best[users], found.values], 1).topk(k, dim=1)
            best_of[users] = torch.cat([best_of[users], some[found.indices]], 1).gather(1, kept)
    return best_of


def _metric_sums(metrics: dict[str, npt.NDArray[np.float64]], users: npt.NDArray[np.bool_]) -> list[float]:
    return [float(users.sum()), float(metrics["recall"][users].sum()), float(metrics["ndcg"][users].sum())]


def digest(model: SequenceModel) -> str:
    """SHA-256 of all parameters."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.tensors().items()):
        sha256.update(name.encode())
        sha256.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # as it lies: a copy is a table
    return sha256.hexdigest()


def _save(
    folder: Folder,
    progress: Progress,
    model: SequenceModel,
    optimizer: Any,
    items: RowWiseAdam | None,
    *,
    mine: npt.NDArray[np.float64],
    keep: int,
) -> None:
    """Rank 0 writes a checkpoint, of which each rank's own sums and random numbers are a part. All ranks call it."""
    by_rank = dist.gather((mine.tolist(), torch.get_rng_state().numpy().tobytes()))
    if dist.rank() == 0:
        progress.rank_sums = [sums for sums, _ in by_rank]
        random = {
            f"rng.{rank}": torch.frombuffer(bytearray(state), dtype=torch.uint8)
            for rank, (_, state) in enumerate(by_rank)
        }
        learnt = {f"model.{name}": tensor for name, tensor in model.tensors().items()}
        moments = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(model, optimizer).items()}
        if items:
            moments |= {f"items.{name}": tensor for name, tensor in items.tensors().items()}
        write_checkpoint(folder, progress, {**learnt, **moments, **random}, keep)


def _scale(settings: TrainSettings) -> float:
    """What the summed loss is divided by before the positions of all ranks are known: about as many, so that no
    gradient is too large or too small for 16 bits on its way."""
    return float(settings.batch_size * settings.local_steps * 16)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}


def _loss(sums: npt.NDArray[np.float64]) -> float:
    """The mean loss, of sums."""
    return float(sums[2] / max(sums[1], 1))


def _figures(spec: RunSpec, progress: Progress) -> dict[str, Any]:
    """How the epoch that is going on goes, in figures."""
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


def _say(event: str, **figures: Any) -> None:
    print(json.dumps({"event": event, **figures}), flush=True)


if __name__ == "__main__":
    train(RunSpec.model_validate_json(Path(sys.argv[1]).read_text()))
