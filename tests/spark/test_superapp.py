"""The generated log: the same for any split of the work, readable by ingest, and with the promised structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import ingest
from jobs.runtime import Runtime
from jobs.tables import EVENTS
from scripts.bench import superapp
from scripts.bench.superapp import FOOD, GROCERIES, RETAIL, RIDES, TASTES, World, log_of_users, taste_of

DAY = 86_400_000_000
WORLD = World(users=9_000, days=5, seed=7, bots=0.002)  # three blocks
SMALL = World(users=700, days=4, seed=5, bots=0.003)


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    """Eight thousand users of a larger world over ten weeks, each event once, with the item's and the user's taste and
    the user's local hour and weekday."""
    world = World(users=50_000, days=70, seed=3)
    rows = pd.DataFrame(log_of_users(world, 0, 8_000)).drop_duplicates("key")
    ranks = np.array(world.ranks())[rows["vertical"]]
    rows["group"], rows["rank"] = rows["slot"] // ranks, rows["slot"] % ranks
    rows["taste"] = taste_of(world, rows["user"].to_numpy())
    rows["item"] = rows["slot"] * 1024 + rows["generation"] * 4 + rows["vertical"]
    local = rows["event_ts"] + superapp._offsets(80)[rows["city"], np.clip(rows["event_ts"] // DAY, 0, 79)]
    rows["hour"], rows["weekday"] = local // 3_600_000_000 % 24, local // DAY % 7
    counts = rows.groupby("user")["basket"].transform("max")
    rows["bot"] = (counts < 0) & (rows.groupby("user")["key"].transform("count") >= 300)
    return rows


def rows_of(frame: DataFrame) -> list[str]:
    """The rows as sorted JSON strings."""
    return sorted(frame.select(F.to_json(F.struct("*")).alias("row")).toPandas()["row"])


def test_the_same_seed_makes_the_same_rows_for_any_partitions(spark: SparkSession) -> None:
    one, three = (superapp.raw_log(spark, WORLD, partitions) for partitions in (1, 3))
    assert three.rdd.getNumPartitions() == 3
    assert rows_of(one) == rows_of(three)


def test_a_user_is_the_same_whoever_is_made_beside_them() -> None:
    whole = pd.DataFrame(log_of_users(WORLD, 0, 3_000))
    parts = pd.concat([pd.DataFrame(log_of_users(WORLD, first, 7)) for first in range(1_000, 1_070, 7)])
    some = whole[whole["user"].between(1_000, 1_069)]
    assert len(some) > 150
    by = ["key", "arrived_at"]
    pd.testing.assert_frame_equal(
        parts.sort_values(by).reset_index(drop=True), some.sort_values(by).reset_index(drop=True)
    )
    other = pd.DataFrame(log_of_users(World(**(vars(WORLD) | {"seed": 8})), 0, 3_000))
    assert other["event_ts"].isin(whole["event_ts"]).mean() < 0.01


@pytest.mark.parametrize("days", [1, 40])
def test_as_many_events_as_were_asked_for(days: int) -> None:
    world = World.of_events(300_000, days)
    made = len(log_of_users(world, 0, world.users)["key"])
    assert abs(made / 300_000 - 1) < 0.1


def test_a_block_may_have_no_event(tmp_path: Path, spark: SparkSession) -> None:
    quiet = next(world for seed in range(99) if not len(log_of_users(world := World(1, seed=seed), 0, 1)["key"]))
    assert superapp.write(spark, quiet, tmp_path, partitions=1) == (0, 0)


def test_files_lie_by_day_of_arrival_and_hold_what_the_frame_has(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "arrived=2020-01-01").mkdir()  # from an older log
    rows, users = superapp.write(spark, WORLD, tmp_path, partitions=2)
    read = spark.read.parquet(str(tmp_path))
    assert rows_of(read.select(*superapp.raw_log(spark, WORLD).columns)) == rows_of(superapp.raw_log(spark, WORLD))
    folders = {path.name.removeprefix("arrived=") for path in tmp_path.iterdir()}
    by_day = read.selectExpr("string(arrived)", "string(date(arrived_at)) AS day", "user_id").toPandas()
    assert (by_day["arrived"] == by_day["day"]).all()
    assert (set(by_day["arrived"]), len(by_day), by_day["user_id"].nunique()) == (folders, rows, users)
    assert {len(list(folder.iterdir())) for folder in tmp_path.iterdir()} <= {1, 2}


def test_a_task_that_holds_little_at_a_time_writes_the_same_rows(spark: SparkSession, tmp_path: Path) -> None:
    blocks = list(superapp._blocks(WORLD, 0, 1))
    before = superapp._ROWS_HELD
    for folder, held in (("small", 10), ("large", before)):
        superapp._ROWS_HELD = held
        try:
            superapp._write_blocks(iter(blocks), tmp_path / folder, "part.parquet")
        finally:
            superapp._ROWS_HELD = before
    small, large = (spark.read.parquet(str(tmp_path / folder)) for folder in ("small", "large"))
    assert rows_of(small) == rows_of(large)
    assert large.count() == sum(map(len, blocks))


def test_ingest_reads_the_files_and_makes_each_event_once(
    spark: SparkSession, make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    superapp.write(spark, SMALL, tmp_path / "superapp", partitions=2)
    source = Path(__file__).parents[2] / "conf/sources/superapp.toml"
    runtime = make_runtime(f'ingest.data_dir="{tmp_path}"', f'ingest.sources=["{source}"]')
    runtime.execute(ingest.STAGE)
    made = superapp.events(spark, SMALL)
    assert superapp.raw_log(spark, SMALL).count() > made.count()  # some are duplicated
    assert rows_of(runtime.latest(EVENTS)) == rows_of(made)


def test_shares_of_late_and_doubled_events() -> None:
    world = World(users=9_000, late=0.03, doubled=0.02)
    rows = pd.DataFrame(log_of_users(world, 0, 9_000))
    twice = rows["key"].duplicated()
    assert twice.mean() == pytest.approx(0.02 / 1.02, rel=0.1)
    first = rows[~twice]  # rows are sorted by arrival
    assert rows["arrived_at"].is_monotonic_increasing
    delay = first["arrived_at"] - first["event_ts"]
    assert ((delay >= DAY) & (delay <= 7 * DAY)).mean() == pytest.approx(0.03, rel=0.1)
    assert delay[delay < DAY].between(1_000_000, 30_000_000).all()


def test_bots_crawl_in_exact_steps_or_burst() -> None:
    rows = pd.DataFrame(log_of_users(World(users=60_000, days=10, bots=0.001), 0, 60_000)).drop_duplicates("key")
    crawlers = bursts = 0
    for _, events in rows.groupby("user"):
        if len(events) >= 300:
            times = np.sort(events["event_ts"])
            crawlers += len(set(np.diff(times))) == 1
            bursts += np.bincount((times - times[0]) // 60_000_000).max() > 1_000
    assert 25 < crawlers < 60  # 0.7 of 60 bots
    assert 8 < bursts < 32


def test_items_are_zipf(log: pd.DataFrame) -> None:
    slots = log[(log["vertical"] == RETAIL) & ~log["bot"]].groupby("slot").size().sort_values(ascending=False)
    # The sixteen tastes' lists overlap, so the slope shows only from the tens on.
    rank = np.arange(1, len(slots) + 1)
    middle = (rank > 50) & (rank < 1_000)
    slope = np.polyfit(np.log(rank[middle]), np.log(slots.to_numpy()[middle]), 1)[0]
    assert -1.3 < slope < -0.8


def test_items_appear_and_die_one_after_another(log: pd.DataFrame) -> None:
    retail = log[(log["vertical"] == RETAIL) & (log["event_type"] != superapp.RETURN)]
    lives = retail.groupby(["slot", "generation"])["event_ts"].agg(["min", "max"]).reset_index()
    followed = lives[lives["slot"].shift(-1) == lives["slot"]]
    following = lives[lives["slot"].shift(1) == lives["slot"]]
    assert len(followed) > 500
    assert (followed["max"].to_numpy() < following["min"].to_numpy()).all()
    assert log[log["vertical"] == RIDES]["generation"].max() == 0  # places never change


def test_people_differ_in_activity_and_come_and_go(log: pd.DataFrame) -> None:
    people = log[~log["bot"]].groupby("user")
    counts = people.size().sort_values(ascending=False)
    assert 0.25 < counts[: len(counts) // 10].sum() / counts.sum() < 0.8
    first, last = people["event_ts"].min(), people["event_ts"].max()
    busy = counts.index[counts > 60]
    assert (first[busy] > 14 * DAY).mean() > 0.1
    assert (last[busy] < 56 * DAY).mean() > 0.05


def test_verticals_have_their_hours_and_days(log: pd.DataFrame) -> None:
    people = log[~log["bot"]]

    def share(vertical: int, name: str, wanted: set[int]) -> float:
        return float(people[people["vertical"] == vertical][name].isin(wanted).mean())

    assert share(FOOD, "hour", {12, 13, 19, 20}) > 0.45
    assert share(RIDES, "hour", {7, 8, 17, 18}) > 0.4
    assert share(RETAIL, "hour", {20, 21, 22}) > 0.3
    assert share(RETAIL, "hour", {2, 3, 4, 5}) < 0.03
    assert share(GROCERIES, "weekday", {5}) > 0.2  # Saturday


def test_people_have_usual_hours_a_shopping_day_and_favourites(log: pd.DataFrame) -> None:
    """Two outings of one person agree more often than those of two people."""
    paid = log[(log["basket"] >= 0) & (log["event_type"] != superapp.RETURN)]
    outings = paid.drop_duplicates("basket").sample(frac=1, random_state=1)  # in no order

    def lead(vertical: int, name: str, *like: str) -> float:
        """How many times as often; `like` are the columns in which the two agree anyway."""
        rows = outings[outings["vertical"] == vertical]

        def agree(by: list[str], one_person: bool) -> float:
            rows_by = rows.sort_values(by, kind="stable") if by else rows
            before = rows_by.shift(1)
            pairs = (rows_by["user"] == before["user"]) == one_person
            for column in like:
                pairs &= rows_by[column] == before[column]
            return float((rows_by[name] == before[name])[pairs].mean())

        return agree([*like, "user"], True) / agree([*like], False)

    for vertical in (RIDES, FOOD, GROCERIES, RETAIL):
        assert lead(vertical, "hour") > 1.5
    assert lead(GROCERIES, "weekday") > 1.5
    assert lead(GROCERIES, "slot", "group") > 1.5


def test_taste_shows_in_what_one_person_takes(log: pd.DataFrame) -> None:
    steps = log[(log["basket"] >= 0) & log["vertical"].isin([GROCERIES, RETAIL])].drop_duplicates("basket")
    assert (steps["group"] == steps["taste"]).mean() > 0.6
    # One person's retail and groceries agree more than two strangers': the signal across verticals.
    first = steps.sort_values("key").groupby(["user", "vertical"])["group"].first().unstack().dropna()
    together = (first[GROCERIES] == first[RETAIL]).mean()
    by_chance = sum((first[GROCERIES] == g).mean() * (first[RETAIL] == g).mean() for g in range(TASTES))
    assert len(first) > 300
    assert together > 3 * by_chance
    assert (steps["category"] % TASTES == steps["group"]).all()


def test_food_after_a_ride_comes_from_the_rides_destination(log: pd.DataFrame) -> None:
    people = log[~log["bot"] & (log["event_type"] != superapp.RETURN)].sort_values(["user", "key"])
    before = people.shift(1)
    soon = (people["user"] == before["user"]) & (people["event_ts"] - before["event_ts"] < DAY // 8)
    after_ride = soon & (people["vertical"] == FOOD) & (before["vertical"] == RIDES)
    assert after_ride.sum() > 500
    assert (people["where"] == before["where"])[after_ride].mean() > 0.8  # another outing may fall between
    assert (people["group"] // 8 == people["where"])[people["vertical"] == FOOD].all()


def test_views_lead_to_the_next_item_and_to_what_is_bought(log: pd.DataFrame) -> None:
    people = log[~log["bot"]].sort_values(["user", "key"])
    before = people.shift(1)
    retail = (people["user"] == before["user"]) & (people["vertical"] == RETAIL) & (before["vertical"] == RETAIL)
    viewed = retail & (people["event_type"] == superapp.VIEW) & (before["event_type"] == superapp.VIEW)
    assert (people["slot"] == before["slot"] + 1)[viewed].mean() > 0.3
    orders = (people["event_type"] == superapp.ORDER) & (before["event_type"] == superapp.VIEW)
    assert (people["slot"] == before["slot"])[orders & (people["basket"] >= 0)].mean() > 0.9


def test_what_is_returned_was_bought(log: pd.DataFrame) -> None:
    returned = log[log["event_type"] == superapp.RETURN]
    bought = log[log["event_type"] == superapp.PURCHASE].set_index("key")
    assert len(returned) > 30
    original = bought.loc[returned["key"] ^ (1 << 23)]
    assert (returned["amount"].to_numpy() == -original["amount"].to_numpy()).all()
    assert (returned["item"].to_numpy() == original["item"].to_numpy()).all()
    assert (returned["event_ts"].to_numpy() > original["event_ts"].to_numpy()).all()
