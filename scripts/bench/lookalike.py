"""Which lookalike method finds people: python scripts/bench/lookalike.py --warehouse FOLDER [--quick] [--work FOLDER]

FOLDER is a warehouse of Complete Journey (`make demo` leaves one in build/warehouse); only its `events` are read. For
each campaign with at least 40 users who redeemed one of its coupons, half of the redeemers, drawn by hash, are the
seeds; the others are hidden among all other users. A method ranks these; its recall is the share of hidden redeemers
in its top tenth. Means over ten draws, then over campaigns.

No method sees anything from a campaign's start on: the events before it go into a separate warehouse (under --work;
minutes of training each, built once and kept), where flag_users to score_users run with conf/local.toml; the last two
weeks before the start are for validation and test. So the model knows nothing of the campaign either. A redeemer
without an event before it has no vector and is left out.

  nearest_seed, tastes, classifier   what export_segments offers (spark_udfs/likeness.py), on user_embeddings
  profile_…                          the same on user_profiles
  mean                               cosine to the mean of the seeds' vectors
  random                             a hash of the user
  rfm_nearest                        recency, frequency, money of purchases (logarithms, standardised): nearest seed
  rfm_logistic                       logistic regression on the same
  rfm_and_counts                     the same, with the logarithms of how many events of each type a user ever had
  item_knn, item_knn_nearest         cosine of the users' purchase counts per item: mean over the seeds, or maximum

The last line is one JSON object: recall by method (the mean over campaigns), by_campaign, best (among the methods that
export_segments offers), and spread, to judge differences by: the standard deviation over draws of the best method.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from measure import last_line, log, put, run_main
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy.sparse import csr_matrix

from jobs import profile_users
from jobs.cli import run_stages
from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.pipeline import STAGES
from jobs.runtime import Runtime
from jobs.tables import CURRENT_MODEL, EVENTS, USER_EMBEDDINGS, USER_PROFILES, Table
from spark_udfs.likeness import Anchors, Method, Scorer, anchors_of, direction_of

Matrix = npt.NDArray[Any]
DRAWS, TOP, TASTES = 10, 0.1, 8
METHODS: tuple[Method, ...] = get_args(Method)
OFFERED = [*METHODS, *(f"profile_{method}" for method in METHODS)]


def campaigns_of(source: Runtime, least: int) -> list[tuple[str, pd.Timestamp, set[str]]]:
    """Number, start and redeemers of each campaign with at least `least` redeemers, in order of time."""
    events = source.latest(EVENTS)
    redeemed = events.where("event_type = 'coupon_redeemed'").select(
        "user_id", F.col("attributes")["campaign_id"].alias("c")
    )
    users = redeemed.distinct().toPandas().groupby("c")["user_id"].agg(set).to_dict()
    received = events.where("event_type = 'campaign_received'").groupBy("item_id").agg(F.min("event_ts").alias("start"))
    starts = {row["item_id"].removeprefix("campaign:"): row["start"] for row in received.toPandas().to_dict("records")}
    return sorted(((c, starts[c], who) for c, who in users.items() if len(who) >= least), key=lambda found: found[1])


def warehouse_before(source: Runtime, start: pd.Timestamp, folder: Path) -> Runtime:
    """A warehouse of the events before `start`, processed up to the users' vectors; created if missing."""
    cuts = {"valid_from": start - pd.Timedelta(days=14), "test_from": start - pd.Timedelta(days=7)}
    sets = [f"sequences.{name}={time:%Y-%m-%dT%H:%M:%SZ}" for name, time in cuts.items()]
    config = load_config("conf/local.toml", [f'storage.root="{folder}"', 'train.tracking_uri="none"', *sets])
    runtime = Runtime(config, source.spark)
    if not runtime.exists(EVENTS):
        before = source.latest(EVENTS).where(F.col("event_ts") < F.lit(start.tz_localize("UTC").to_pydatetime()))
        put(runtime, EVENTS, before)
    names = [stage.name for stage in STAGES]
    road = STAGES[names.index("flag_users") : names.index("score_users") + 1]
    run_stages(runtime, [*road, profile_users.STAGE])  # finished stages are skipped
    return runtime


def standardised(columns: list[Any]) -> Matrix:
    """The logarithms of these numbers of users, [users, columns]."""
    logs = np.log1p(np.column_stack(columns))
    return np.asarray((logs - logs.mean(axis=0)) / logs.std(axis=0))


def without_vectors(events: DataFrame, users: list[str], start: pd.Timestamp) -> tuple[Matrix, Matrix, csr_matrix]:
    """Recency, frequency, money of purchases, standardised [users, 3]; the same with the user's counts of each event
    type; and item counts [users, items], rows of unit length. `events`: those before `start`."""
    bought = events.where("event_type = 'purchase'")
    by_user = bought.groupBy("user_id").agg(
        F.max("event_ts").alias("last"), F.countDistinct("basket_id").alias("baskets"), F.sum("amount").alias("money")
    )
    facts = by_user.toPandas().set_index("user_id").reindex(users)
    days = facts["last"].rsub(start).dt.total_seconds() / 86_400
    rfm = [days.fillna(365), facts["baskets"].fillna(0), facts["money"].fillna(0).clip(lower=0)]
    of_types = events.groupBy("user_id").pivot("event_type").count().toPandas().set_index("user_id").reindex(users)
    by_type = [of_types[name].fillna(0) for name in of_types]
    items = bought.groupBy("user_id", "item_id").count().toPandas()
    items = items[items["user_id"].isin(set(users))]
    of_users: Any = pd.Index(users)
    rows = of_users.get_indexer(items["user_id"])
    columns, names = pd.factorize(items["item_id"])
    counts = csr_matrix((items["count"].to_numpy(float), (rows, columns)), shape=(len(users), len(names)))
    lengths = np.sqrt(counts.multiply(counts).sum(axis=1)).A1
    scale = csr_matrix((1 / np.where(lengths > 0, lengths, 1), (range(len(users)), range(len(users)))))
    return standardised(rfm), standardised([*rfm, *by_type]), scale @ counts


def share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def alike(vectors: Matrix, seed: Matrix) -> dict[str, Matrix]:
    """The scores of export_segments' methods, and of the seeds' mean."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    anchors = {method: anchors_of(method, vectors[seed], vectors[~seed], TASTES) for method in METHODS}
    mean = Anchors(unit[seed].mean(axis=0, keepdims=True).astype(np.float32), "cosine")
    return dict(zip([*anchors, "mean"], Scorer([*anchors.values(), mean]).approximate(vectors), strict=True))


def baselines(rfm: Matrix, rfm_and_counts: Matrix, counts: csr_matrix, seed: Matrix) -> dict[str, Matrix]:
    """The scores of every user by what `without_vectors` returns. `seed`: bool mask of the seeds."""
    distances = np.linalg.norm(rfm[:, None] - rfm[seed][None], axis=2)
    similar = (counts @ counts[seed].T).toarray()
    return {
        "rfm_nearest": -distances.min(axis=1),
        "rfm_logistic": rfm @ direction_of(rfm[seed], rfm[~seed]),
        "rfm_and_counts": rfm_and_counts @ direction_of(rfm_and_counts[seed], rfm_and_counts[~seed]),
        "item_knn": similar.mean(axis=1),
        "item_knn_nearest": similar.max(axis=1),
    }


def vectors_of(runtime: Runtime, table: Table, version: str) -> tuple[list[str], Matrix]:
    rows = runtime.latest(table).where(F.col("model_version") == version).toPandas().sort_values("user_id")
    return rows["user_id"].tolist(), np.stack(rows["vector"].tolist()).astype(np.float32)


def recalls(
    source: Runtime, campaign: str, start: pd.Timestamp, redeemers: set[str], work: Path
) -> dict[str, list[float]]:
    """The recall of each draw, by method."""
    runtime = warehouse_before(source, start, work / f"campaign-{campaign}")
    version = runtime.latest(CURRENT_MODEL).collect()[0]["model_version"]
    users, vectors = vectors_of(runtime, USER_EMBEDDINGS, version)
    same_users, profiles = vectors_of(runtime, USER_PROFILES, version)
    assert users == same_users
    facts = without_vectors(runtime.latest(EVENTS), users, start)
    redeemed = np.array([user in redeemers for user in users])
    log(f"campaign {campaign}, from {start:%Y-%m-%d}: {redeemed.sum()} redeemers among {len(users):,} users")
    by_method: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        seed = redeemed & np.array([share(f"{draw} {campaign} {user}") < 0.5 for user in users])
        hidden = redeemed & ~seed
        scores = alike(vectors, seed) | {f"profile_{name}": of for name, of in alike(profiles, seed).items()}
        scores |= baselines(*facts, seed)
        scores["random"] = np.array([share(f"random {draw} {user}") for user in users])
        top = round(TOP * (~seed).sum())
        for method, of_users in scores.items():
            first = np.argsort(-np.where(seed, -np.inf, of_users), kind="stable")[:top]
            by_method.setdefault(method, []).append(hidden[first].sum() / hidden.sum())
    return by_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warehouse", type=Path, required=True, help="a warehouse of Complete Journey")
    parser.add_argument("--quick", action="store_true", help="the first campaign only")
    parser.add_argument("--least", type=int, default=40, help="minimum number of redeemers of a campaign (default: 40)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench/lookalike"), help="folder for the campaigns' warehouses"
    )
    arguments = parser.parse_args()
    source = Runtime(load_config("conf/local.toml", [f'storage.root="{arguments.warehouse.absolute()}"']))
    if not source.exists(EVENTS):
        raise TrailvecError(f"{arguments.warehouse} holds no events: run `make demo`, or name another --warehouse")
    campaigns = campaigns_of(source, arguments.least)
    if not campaigns:
        raise TrailvecError(f"no campaign in {arguments.warehouse} has {arguments.least} redeemers: lower --least")
    draws_by_campaign = {
        campaign: recalls(source, campaign, start, users, arguments.work.absolute())
        for campaign, start, users in campaigns[: 1 if arguments.quick else None]
    }
    source.spark.stop()

    by_campaign = {c: {m: statistics.mean(draws) for m, draws in of.items()} for c, of in draws_by_campaign.items()}
    methods = list(next(iter(by_campaign.values())))
    recall = {method: statistics.mean(of[method] for of in by_campaign.values()) for method in methods}
    best = max(OFFERED, key=lambda method: recall[method])
    for method in sorted(recall, key=lambda name: -recall[name]):
        each = "  ".join(f"{of[method]:.3f}" for of in by_campaign.values())
        print(f"{method:<20} {recall[method]:.3f}   {each}")
    last_line(
        {
            "recall": {method: round(value, 4) for method, value in recall.items()},
            "by_campaign": {c: {m: round(v, 4) for m, v in of.items()} for c, of in by_campaign.items()},
            "best": best,
            "spread": statistics.mean(statistics.stdev(of[best]) for of in draws_by_campaign.values()),
            "draws": DRAWS,
        }
    )


if __name__ == "__main__":
    run_main(main)
