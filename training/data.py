"""Feeds training from the Parquet files of one Delta snapshot: the only module that imports Petastorm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as pds
import torch

# Petastorm 0.12.1 uses what pyarrow 14 calls deprecated, on every read. Its own FutureWarnings, nothing else.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

from petastorm import TransformSpec, make_batch_reader  # noqa: E402
from petastorm.pytorch import BatchedDataLoader  # noqa: E402

from training.batches import FEATURES, SAME_MOMENT, SESSION_END, TARGET, pad  # noqa: E402

Batch = dict[str, torch.Tensor]

# Rows that are shuffled together; a row group is read as a whole, so the order inside it must not matter.
SHUFFLED_ROWS = 16_384


def read_batches(
    files: list[str],
    *,
    max_length: int,
    batch_size: int,
    rank: int,
    size: int,
    seed: int,
    later_share: float = 0.0,
    horizon: int = 1,
) -> Iterator[Batch]:
    """One pass over this rank's row groups, every row once.

    The order of row groups comes from `seed`, the order of rows from torch's global generator: seed both.

    Args:
        files: file:// URLs of Parquet files with the columns of `sequences`; at least `size` row groups in all.
        max_length: a longer row keeps its newest actions.
        seed: the same on all ranks; another one for each epoch.
        later_share, horizon: see `choose_targets`.

    Yields:
        For each of FEATURES, and `target`, int64 [rows, length]: `batch_size` rows (fewer in the last batch), the
        longest row's length, zeros after a row's end.
    """
    spec = TransformSpec(
        lambda frame: _to_actions(frame, max_length),
        edit_fields=[("actions", np.int32, (len(FEATURES) * max_length,), False)],
        selected_fields=["actions"],
    )
    reader = make_batch_reader(
        files,
        schema_fields=[f"^{name}$" for name in ("length", *FEATURES)],
        transform_spec=spec,
        reader_pool_type="dummy",  # reads in this thread, so that the order does not depend on threads
        num_epochs=1,
        cur_shard=rank,
        shard_count=size,
        seed=seed,
    )
    with BatchedDataLoader(reader, batch_size, shuffling_queue_capacity=SHUFFLED_ROWS) as loader:
        for batch in loader:
            rows = to_batch(batch["actions"].view(-1, len(FEATURES), max_length).transpose(0, 1))
            yield choose_targets(shuffle_moments(rows), later_share, horizon)


def to_batch(actions: torch.Tensor) -> Batch:
    """int [features, rows, length] → the batch, cut to its longest row."""
    longest = int((actions[0] > 0).sum(dim=1).max())
    return dict(zip(FEATURES, actions[:, :, :longest].long(), strict=True))


def shuffle_moments(batch: Batch) -> Batch:
    """The actions of each moment (the same event_ts: a basket) in a new order, drawn from torch's global generator.

    Their order in the log goes by event_id and says nothing about the user, but a model would learn it. What belongs
    to the place and not to the action, gap_bucket and session_end, stays where it is.
    """
    moment = (batch["gap_bucket"] != SAME_MOMENT).cumsum(dim=1)  # padding counts on, and so stays at the end
    order = (moment + torch.rand(moment.shape)).argsort(dim=1)
    return {n: v if n in ("gap_bucket", "session_end") else v.gather(1, order) for n, v in batch.items()}


def choose_targets(batch: Batch, later_share: float, horizon: int) -> Batch:
    """The batch with what each action is to predict: `target`, int64 [rows, length], 0 where there is nothing.

    A share of the actions, drawn from torch's global generator, is asked not for the next action but for any of the
    first `horizon` actions after its session, and says session_end, as the newest action before a cut does. The next
    action mostly completes the visit that is going on; what comes in later visits is what a vector is asked for, and a
    longer horizon is a steadier answer (Pancha et al., PinnerFormer, 2022, train on all actions of a window).
    """
    items, ends = batch[FEATURES[0]], batch["session_end"]
    present = items > 0
    following = torch.nn.functional.pad(items[:, 1:], (0, 1))
    # Which session of its row an action is in: as many as have ended before it; and where the next one starts.
    session = torch.nn.functional.pad((ends == SESSION_END).cumsum(dim=1)[:, :-1], (1, 0))
    sizes = torch.zeros(len(items), items.shape[1] + 1, dtype=torch.int64).scatter_add_(1, session, present.long())
    start = sizes.cumsum(dim=1).gather(1, session)
    later = (present.sum(dim=1, keepdim=True) - start).clamp(max=horizon)
    asked = (torch.rand(items.shape) < later_share) & (later > 0) & present
    place = torch.where(asked, start + (torch.rand(items.shape) * later).long(), 0)
    target = torch.where(asked, items.gather(1, place), following)
    return {**batch, "session_end": ends.masked_fill(asked, SESSION_END), TARGET: target}


def _to_actions(frame: pd.DataFrame, max_length: int) -> pd.DataFrame:
    # One column instead of eight: Petastorm handles every cell of every column by itself.
    lengths = frame["length"].to_numpy(np.int64)
    columns = [pad(np.concatenate(frame[name].to_numpy()), lengths, max_length) for name in FEATURES]
    return pd.DataFrame({"actions": list(np.concatenate(columns, axis=1))})


@dataclass(frozen=True)
class Held:
    """Users held out for validation: what they did, and what they did next.

    `actions` int32 [features, users, length]; user u's targets are `targets[offsets[u]:offsets[u + 1]]`.
    """

    actions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def part(self, rank: int, size: int) -> Held:
        """Every size-th user from `rank` on."""
        users = np.arange(rank, len(self.offsets) - 1, size)
        lists = [self.targets[self.offsets[u] : self.offsets[u + 1]] for u in users]
        return Held(
            self.actions[:, users],
            np.concatenate([*lists, np.empty(0, np.int64)]).astype(np.int64),
            np.cumsum([0, *map(len, lists)]),
        )


def read_held(files: list[str], max_length: int, known: npt.NDArray[np.bool_], max_users: int) -> Held:
    """The first `max_users` rows of the valid split with a known target: the items at the earliest target time.

    Args:
        files: file:// URLs of the split's files (Spark has spread the users over them by hash).
        known: whether the model knows an item, [items]; other targets are left out.
    """
    columns = ["length", *FEATURES, "target_item_index", "target_ts"]
    paths = [url.removeprefix("file://") for url in files]
    table = pds.dataset(paths).head(max_users, columns=columns).combine_chunks()

    def flat(name: str) -> npt.NDArray[np.int64]:
        return np.asarray(pc.list_flatten(table[name]).to_numpy(), np.int64)

    counts = pc.fill_null(pc.list_value_length(table["target_ts"]), 0).to_numpy()
    owner, items, times = np.repeat(np.arange(len(table)), counts), flat("target_item_index"), flat("target_ts")
    first = np.zeros(len(table), np.int64)
    first[counts > 0] = times[(np.cumsum(counts) - counts)[counts > 0]]  # the lists are in order of time
    wanted = (times == first[owner]) & (items < len(known)) & known[np.minimum(items, len(known) - 1)]
    owner, items = owner[wanted], items[wanted]

    users, user_counts = np.unique(owner, return_counts=True)
    lengths = table["length"].to_numpy().astype(np.int64)
    actions = np.stack([pad(flat(name).astype(np.int32), lengths, max_length)[users] for name in FEATURES])
    return Held(actions, items, np.concatenate([[0], np.cumsum(user_counts)]))
