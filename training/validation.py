"""Ranking quality during training: held-out users' next items, over the whole catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training import dist
from training.arrays import Bool, Float64, Int64
from training.data import Held, to_batch, to_device
from training.metrics import HISTORY_FROM, HISTORY_NAMES, metrics_by_class, rank_metrics
from training.model import SequenceModel
from training.scoring import fast_encoder

ITEMS_AT_ONCE, USERS_AT_ONCE = 16_384, 256  # 16 MB of scores, however large the catalogue is


@torch.inference_mode()
def validate(  # noqa: PLR0917 - all of it is what is ranked
    model: SequenceModel,
    held: Held,
    known: Bool,
    batch_size: int,
    device: torch.device,
    item_verticals: Int64,
    verticals: list[str],
) -> dict[str, Any]:
    """Recall@10 and NDCG@10 of the next item over all known items, averaged over the users of all ranks.

    Also averaged per history-length class (`by_history`), and per vertical over the users with a next item in it
    (`by_vertical`; next items of other verticals do not count there). `item_verticals`: see RunSpec. Empty without
    users."""
    model.eval()
    encode = fast_encoder(model)  # of the weights as they are now
    states = torch.empty((held.actions.shape[1], model.spec.width), device=device)
    for start in range(0, len(states), batch_size):
        batch = to_batch(torch.from_numpy(held.actions[:, start : start + batch_size]))
        states[start : start + batch_size] = encode(to_device(batch, device))
    ranked = torch.from_numpy(np.flatnonzero(known)).to(device)
    top_items = best_items(model, states, ranked, (held.seen, held.seen_offsets)).cpu().numpy()
    metrics = rank_metrics(top_items, held.targets, held.offsets)
    classes = np.searchsorted(HISTORY_FROM, (held.actions[0] > 0).sum(axis=1), side="right") - 1
    sums = [_metric_sums(metrics, np.ones(len(classes), bool))]
    sums += [_metric_sums(metrics, classes == number) for number in range(len(HISTORY_FROM))]
    places = item_verticals[held.targets]
    _, of, metrics = metrics_by_class(top_items, held.targets, held.offsets, places, len(verticals))
    sums += [_metric_sums(metrics, of == number) for number in range(len(verticals))]
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
        "by_history": {name: mean for name, mean in zip(HISTORY_NAMES, of_class, strict=True) if mean},
        "by_vertical": {name: mean for name, mean in zip(verticals, of_vertical, strict=True) if mean},
    }


def best_items(
    model: SequenceModel, states: torch.Tensor, items: torch.Tensor, excluded: tuple[Int64, Int64], k: int = 10
) -> torch.Tensor:
    """The best-scoring items for each state, best first, int64 [users, at most k]; padded with -1.

    Works in chunks: the scores and vectors of all items are never in memory at once.

    Args:
        states: float32 [users, width].
        items: int64 [n], sorted: the items to rank.
        excluded: the items not to rank for each user, concatenated, and where each user's begin, [users + 1].
    """
    k = min(k, len(items))
    unwanted, offsets = torch.from_numpy(excluded[0]).to(states.device), excluded[1]
    owner = torch.from_numpy(np.repeat(np.arange(len(states)), np.diff(offsets))).to(states.device)
    best = torch.full((len(states), k), -torch.inf, device=states.device)
    best_of = torch.zeros((len(states), k), dtype=torch.int64, device=states.device)
    for some in torch.split(items, ITEMS_AT_ONCE):
        vectors = model.item_vectors(some).T
        for start in range(0, len(states), USERS_AT_ONCE):
            users = slice(start, start + USERS_AT_ONCE)
            scores = states[users] @ vectors  # in 32 bits (a GPU rounds factors to TF32): 16 would make ties
            theirs = slice(offsets[start], offsets[start + len(scores)])
            place = torch.searchsorted(some, unwanted[theirs]).clamp_(max=len(some) - 1)
            found = some[place] == unwanted[theirs]
            scores[owner[theirs][found] - start, place[found]] = -torch.inf
            top = scores.topk(min(k, len(some)), dim=1)
            best[users], kept = torch.cat([best[users], top.values], 1).topk(k, dim=1)
            best_of[users] = torch.cat([best_of[users], some[top.indices]], 1).gather(1, kept)
    return best_of.masked_fill_(best == -torch.inf, -1)


def _metric_sums(metrics: dict[str, Float64], users: Bool) -> list[float]:
    return [float(users.sum()), float(metrics["recall"][users].sum()), float(metrics["ndcg"][users].sum())]
