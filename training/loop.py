"""Trains one model. `trailvec train` writes the run spec and starts this, once per process:

    horovodrun --gloo -np 2 -H localhost:2 python -m training.loop RUN_SPEC.json
    python -m training.loop RUN_SPEC.json            # one process

Every process reads its own row groups and computes its own gradients; the gradients are summed, so that a step
with N processes is a step with an N times larger batch. Rank 0 speaks (one line on stdout per epoch, and one
every few seconds in between) and writes the model.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.errors import TrailvecError
from training import dist
from training.batches import FEATURES
from training.checkpoint import save_model
from training.config import RunSpec, TrainSettings
from training.data import Held, read_batches, read_held, to_batch
from training.metrics import rank_metrics
from training.model import SequenceModel, build_model
from training.start import item_factors

WARM_UP = 0.05  # of all rows: the learning rate rises to its full value
FINAL_RATE = 0.05  # of the learning rate, reached at the end along a cosine
MAX_HELD_USERS = 10_000
SECONDS_BETWEEN_LINES = 10.0


def train(spec: RunSpec) -> None:  # noqa: PLR0915 - one flat loop in reading order
    """Trains, validates after each epoch, and writes the best epoch's model. All ranks call it."""
    settings = spec.settings
    dist.start()
    rank, size = dist.rank(), dist.size()
    torch.set_num_threads(settings.threads)

    # The same first weights everywhere; from then on each rank draws its own negatives and dropout.
    torch.manual_seed(settings.seed)
    item_counts = torch.from_numpy(np.load(spec.item_counts))
    attributes = torch.from_numpy(np.load(spec.item_attributes)) if spec.item_attributes else None
    model = build_model(spec.model, item_counts, attributes)
    known = item_counts.numpy() > 0
    if rank == 0:  # the other ranks get it with the first weights, from the broadcast below
        model.start_from(torch.from_numpy(item_factors(spec.train_files, known, spec.model.width, settings.seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = dist.distribute(model, optimizer)
    held = read_held(spec.valid_files, spec.model.history_length, known, MAX_HELD_USERS) if spec.valid_files else None
    held_part = held.part(rank, size) if held is not None else None

    best, best_epoch, best_tensors = -1.0, 0, model.tensors()
    history: list[dict[str, Any]] = []
    rows_done, started, last_line = 0.0, time.monotonic(), time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        # ---- one pass over the rows; a rank that has run out goes on with empty steps until all have
        epoch_started = time.monotonic()
        model.train()
        seed = settings.seed + 1000 * epoch
        torch.manual_seed(seed + rank)
        batches = read_batches(
            spec.train_files,
            max_length=spec.model.max_length,
            batch_size=settings.batch_size,
            rank=rank,
            size=size,
            seed=seed,
            later_share=settings.later_share,
            horizon=settings.horizon,
            shuffle_baskets=settings.shuffle_baskets,
        )
        mine, everyone = np.zeros(3), np.zeros(3)  # rows, positions, summed loss
        while True:
            batch = next(batches, None)
            loss, positions = model.loss(batch) if batch is not None else (torch.zeros(()), 0)
            rows = len(batch[FEATURES[0]]) if batch is not None else 0
            step = dist.total([rows, positions, float(loss)])
            if step[0] == 0:
                break
            if not math.isfinite(step[2]):
                raise TrailvecError(f"the loss is {step[2]} in epoch {epoch}: lower train.learning_rate")
            optimizer.zero_grad()
            if positions > 0:
                (loss / step[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            rows_done += step[0]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, rows_done / (settings.epochs * spec.train_rows))
            with optimizer.skip_synchronize():
                optimizer.step()

            mine += [rows, positions, float(loss)]
            everyone += step
            if rank == 0 and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                share = everyone[0] / spec.train_rows
                print(_line(spec, epoch, everyone, time.monotonic() - started, f"{share:.0%}"), flush=True)
        training_seconds = time.monotonic() - epoch_started

        # ---- validation: each rank ranks its part of the users, the sums meet
        scores = validate(model, held_part, known, settings.batch_size, spec.new_only) if held_part is not None else {}
        by_rank = dist.gather([float(value) for value in mine])
        history.append(
            {
                "epoch": epoch,
                "loss": everyone[2] / max(everyone[1], 1),
                "loss_by_rank": [loss / max(positions, 1) for _, positions, loss in by_rank],
                "rows_by_rank": [int(rows) for rows, _, _ in by_rank],
                "positions": int(everyone[1]),
                "rows_per_second": everyone[0] / training_seconds,
                "seconds": time.monotonic() - epoch_started,
                **scores,
            }
        )
        if rank == 0:
            said = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(_line(spec, epoch, everyone, time.monotonic() - started, said), flush=True)
        # Without held-out users the last epoch is the best.
        if (score := scores.get("ndcg@10", float(epoch))) > best:
            best, best_epoch = score, epoch
            best_tensors = {name: tensor.clone() for name, tensor in model.tensors().items()}

    # ---- the best epoch's weights: the same on all ranks, or something is badly wrong
    model.load_tensors(best_tensors)
    digests = dist.gather(digest(model))
    if len(set(digests)) > 1:
        raise RuntimeError(f"the ranks ended with different parameters: {digests}")
    if rank == 0:
        training = {
            "processes": size,
            "epochs": history,
            "best_epoch": best_epoch,
            "held_users": len(held.offsets) - 1 if held is not None else 0,
            "seconds": time.monotonic() - started,
            "parameters_sha256_by_rank": digests,
        }
        save_model(Path(spec.output), model, {**spec.about, "training": training})


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """The learning rate after `progress` (0 to 1) of all rows: a linear warm-up, then a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return settings.learning_rate * min(progress / WARM_UP, FINAL_RATE + (1 - FINAL_RATE) * cosine)


@torch.inference_mode()
def validate(
    model: SequenceModel, held: Held, known: np.ndarray[Any, Any], batch_size: int, new_only: bool
) -> dict[str, float]:
    """Recall@10 and NDCG@10 of the next item over all known items; means over all ranks' users.

    With `new_only` the items of the row that the model reads are left out.
    """
    model.eval()
    vectors = model.item_vectors()
    unknown, k = torch.from_numpy(~known), min(10, int(known.sum()))
    ranked = [np.empty((0, k), np.int64)]
    for start in range(0, held.actions.shape[1], batch_size):
        actions = torch.from_numpy(held.actions[:, start : start + batch_size])
        scores = model.encode(to_batch(actions)) @ vectors.T
        scores.masked_fill_(unknown, -torch.inf)
        if new_only:
            scores.scatter_(1, actions[0].long(), -torch.inf)
        top = scores.topk(k, dim=1)
        ranked.append(top.indices.numpy())
    metrics = rank_metrics(np.concatenate(ranked), held.targets, held.offsets)
    users, recall, ndcg = dist.total([len(metrics["ndcg"]), metrics["recall"].sum(), metrics["ndcg"].sum()])
    return {"recall@10": recall / users, "ndcg@10": ndcg / users} if users else {}


def digest(model: SequenceModel) -> str:
    """SHA-256 of all parameters."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.tensors().items()):
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


def _line(spec: RunSpec, epoch: int, sums: np.ndarray[Any, Any], seconds: float, more: str) -> str:
    rows_done = (epoch - 1) * spec.train_rows + sums[0]
    left = round(seconds / rows_done * (spec.settings.epochs * spec.train_rows - rows_done))
    return (
        f"epoch {epoch}/{spec.settings.epochs}  loss {sums[2] / max(sums[1], 1):.4f}  {more}  "
        f"{rows_done / seconds:,.0f} rows/s  {left // 60}:{left % 60:02} left"
    )


if __name__ == "__main__":
    train(RunSpec.model_validate_json(Path(sys.argv[1]).read_text()))
