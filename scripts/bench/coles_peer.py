"""CoLES's half of scripts/bench/probes.py: pytorch-lifestream, in its own environment.

Learns contrastive vectors of users (Babaev et al. 2022, arXiv 2002.08232) with the settings of the package's own
example, except the width: a GRU of 128 (256 there, which takes three times as long), five slices of 25 to 200 events
per user, contrastive loss with margin 0.5 and hard negatives, 15 epochs.

Arguments: epochs, then pairs of files: input events (Parquet, sorted by user and time: user_id, time in days, amount,
and codes from 1 up), and output vectors (user_id, vector). It trains on the first file and encodes the users of each.
"""

import sys
import time
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ptls.data_load.utils import collate_feature_dict
from ptls.frames.coles import ColesDataset, CoLESModule
from ptls.frames.coles.losses import ContrastiveLoss
from ptls.frames.coles.sampling_strategies import HardNegativePairSelector
from ptls.frames.coles.split_strategy import SampleSlices
from ptls.nn import RnnSeqEncoder, TrxEncoder

NUMBERS = ("time", "amount")
WIDTH, BATCH, LONGEST = 128, 64, 4_000  # LONGEST: events per user that are encoded, the newest
PLACES = 32  # embedding width of a code, at most


def read(path: str) -> tuple[npt.NDArray[np.object_], list[dict[str, torch.Tensor]]]:
    """The user ids, and each user's events by column."""
    table = pq.read_table(path).to_pandas()
    ids = table["user_id"].to_numpy()
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    names = [name for name in table.columns if name not in ("user_id", *NUMBERS)]
    columns = {name: torch.from_numpy(table[name].to_numpy(np.int64)) for name in names}
    columns["amount"] = torch.from_numpy(table["amount"].to_numpy(np.float32))
    columns["event_time"] = torch.from_numpy(table["time"].to_numpy(np.float32))
    ends = [*starts[1:], len(table)]
    users = [{name: of[start:end] for name, of in columns.items()} for start, end in zip(starts, ends, strict=True)]
    return ids[starts], users


def main() -> None:
    epochs, files = int(sys.argv[1]), sys.argv[2:]
    parts = [read(path) for path in files[::2]]
    _, users = parts[0]
    codes = [name for name in users[0] if name not in ("amount", "event_time")]

    np.random.seed(0)  # the package draws its slices from NumPy's global state
    torch.manual_seed(0)
    sizes = {name: 1 + max(int(user[name].max()) for _, all_users in parts for user in all_users) for name in codes}
    encoder = RnnSeqEncoder(
        trx_encoder=TrxEncoder(
            embeddings_noise=0.003,
            numeric_values={"amount": "identity"},
            embeddings={name: {"in": size, "out": min(PLACES, size)} for name, size in sizes.items()},
        ),
        hidden_size=WIDTH,
        type="gru",
    )
    model = CoLESModule(
        encoder,
        loss=ContrastiveLoss(margin=0.5, sampling_strategy=HardNegativePairSelector(neg_count=5)),
        optimizer_partial=partial(torch.optim.Adam, lr=0.001),
        lr_scheduler_partial=partial(torch.optim.lr_scheduler.StepLR, step_size=30, gamma=0.9),
    )
    dataset = ColesDataset(users, SampleSlices(split_count=5, cnt_min=25, cnt_max=200))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, collate_fn=dataset.collate_fn, drop_last=True)
    (optimizer,), _ = model.configure_optimizers()
    model.train()
    for epoch in range(epochs):
        started, losses = time.monotonic(), []
        for sequences, labels in loader:
            optimizer.zero_grad()
            loss = model._loss(*model.shared_step(sequences, labels))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(
            f"CoLES epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.3f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )

    model.eval()
    for (ids, events), out in zip(parts, files[1::2], strict=True):
        vectors = np.empty((len(events), WIDTH), np.float32)
        by_length = np.argsort([len(user["event_time"]) for user in events])
        with torch.inference_mode():
            for block in np.array_split(by_length, max(1, len(events) // BATCH)):
                batch = collate_feature_dict([{name: of[-LONGEST:] for name, of in events[n].items()} for n in block])
                vectors[block] = model(batch).numpy()
        pq.write_table(pa.table({"user_id": ids, "vector": list(vectors)}), out)


if __name__ == "__main__":
    main()
