"""The probe stage: labels and features by hand, none of them from after a user's cut, and the table it writes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import build_vocabulary, models, probe, profile_users, sessionize
from jobs.errors import TrailvecError
from jobs.files import write_json
from jobs.runtime import Runtime
from jobs.spark_session import spark_conf
from jobs.splits import Cuts, log_end
from jobs.tables import (
    CONTEXT_VALUES,
    CURRENT_MODEL,
    FLAGGED_USERS,
    ITEMS,
    PROBES,
    SESSIONS,
    USER_PROFILES,
    events_of,
)
from tests.conftest import add, make_config, put, read_delta
from tests.events import Row, make_event, to_frame
from tests.sequence_files import SPEC
from training.batches import FIRST_INDEX
from training.checkpoint import rotation_sha256, write_alignment

START = datetime(2024, 1, 1)
CUT = START + timedelta(days=100)
SETTINGS = (
    "vocabulary.min_count=1",
    "sequences.max_length=4",
    'probe.activity=["inactive", "new_vertical"]',
    'probe.event_types=["redeem"]',
    "probe.days=20",
    "probe.folds=2",
    "probe.seeds=2",
    'probe.heads=["logistic"]',
)


def event(user: str, day: float, item: str = "i1", **values: Any) -> Row:
    when = START + timedelta(days=day)
    named = {"event_id": f"{user}-{day}-{item}", "user_id": user, "item_id": item, "event_ts": when}
    return make_event(**(named | {"amount": 2.0, "quantity": 1.0} | values))


def log() -> list[Row]:
    """24 users act before day 100; in the 20 days after, the even ones do not, and every third redeems or rides for the
    first time. The log ends at day 120."""
    events = []
    for n in range(24):
        events += [event(f"u{n}", 10 + day, f"i{(n + day) % 5}") for day in range(0, 60 + n % 7, 7)]
        events += [event(f"u{n}", 105)] if n % 2 else []
        events += [event(f"u{n}", 110, "coupon", event_type="redeem", vertical="coupons")] if n % 3 == 0 else []
        events += [event(f"u{n}", 111, "ride", vertical="rides")] if n % 3 == 1 and n % 2 else []
    events += [event("u0", 100, "coupon", event_type="redeem", vertical="coupons")]  # at the cut, so not before it
    return [*events, event("late", 120 - 1e-6 / 86400)]


def fill(runtime: Runtime, events: list[Row], min_count: int = 1) -> None:
    """Makes the tables that a probe reads of these events, as their stages would."""
    spark = runtime.spark
    put(runtime, SESSIONS, sessions_of(runtime, events))
    put(runtime, ITEMS, items_of(runtime, events, FIRST_INDEX, min_count))
    none = spark.createDataFrame([], CONTEXT_VALUES.schema())
    put(runtime, CONTEXT_VALUES, build_vocabulary.number_context_values(to_frame(spark, events), none))


def sessions_of(runtime: Runtime, events: list[Row]) -> DataFrame:
    return sessionize.sessionize(to_frame(runtime.spark, events), runtime.config.sessionize)


def items_of(runtime: Runtime, events: list[Row], first_index: int, min_count: int = 1) -> DataFrame:
    log, none = to_frame(runtime.spark, events), runtime.spark.createDataFrame([], ITEMS.schema())
    described = build_vocabulary.describe_items(log, Cuts(CUT, CUT, CUT), runtime.config.sequences)
    return build_vocabulary.number_items(described, none, min_count, first_index)


def describe_model(runtime: Runtime) -> None:
    folder = runtime.models / "m1"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model.json", {"spec": SPEC.model_dump(), "weights_sha256": ""})
    write_json(runtime.models / "current.json", {"model_version": "m1"})


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse of the whole log; each test takes a copy."""
    root = tmp_path_factory.mktemp("filled")
    runtime = Runtime(make_config(root, *SETTINGS), spark)
    fill(runtime, log())
    put(runtime, FLAGGED_USERS, spark.createDataFrame([], FLAGGED_USERS.schema()))
    describe_model(runtime)
    return root


@pytest.fixture
def whole(filled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filled, tmp_path / "whole")


def make_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A model whose vector is its input: the row's items, as four numbers. Returns its description."""

    def encode(_: Runtime, rows: DataFrame, keep: list[str], *, model_dir: Path) -> DataFrame:
        padded = F.slice(F.concat(F.reverse("item_index"), F.array_repeat(F.lit(0), 4)), 1, 4)
        return rows.select(*keep, padded.cast("array<float>").alias("vector"))

    about = {"as_of": "2024-03-01T00:00:00.000000"}
    monkeypatch.setattr(profile_users, "encode_sequences", encode)
    monkeypatch.setattr(probe, "read_description", lambda folder: about)
    return about


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return make_model(monkeypatch)


Asked = tuple[pd.DataFrame, list[str], dict[str, np.ndarray]]  # a question's labels, users and features


class Probed(NamedTuple):
    """The whole log's warehouse after a run of the stage, with the labels' file, the run's notes and its questions."""

    root: Path
    labels: Path
    notes: list[str]
    asked: list[Asked]


@pytest.fixture(scope="module")
def probed(filled: Path, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    root = shutil.copytree(filled, tmp_path_factory.mktemp("probed") / "whole")
    file = root.parent / "labels.csv"
    lines = [f"u{n},many,{n % 7 // 4}" for n in range(24)]  # n % 7 determines how long the user was active
    file.write_text("\n".join(["user_id,task,label", *lines]) + "\n")
    asked: list[Asked] = []
    features_of = probe.features_of

    def recorded(runtime: Runtime, sessions: DataFrame, question: probe.Question, *rest: Any) -> Any:
        asked.append((question.labels, *features_of(runtime, sessions, question, *rest)))
        return asked[-1][1:]

    with pytest.MonkeyPatch.context() as patch:
        make_model(patch)
        patch.setattr(probe, "features_of", recorded)
        report = Runtime(make_config(root, *SETTINGS, f'probe.labels={{file="{file}"}}'), spark).execute(probe.STAGE)
    return Probed(root, file, report.notes, asked)


def ask(runtime: Runtime, answer: Callable[[probe.Question, datetime], Any]) -> list[Any]:
    """The result of `answer(question, log's end)` for each question."""
    found: list[Any] = []

    def go(running: Runtime) -> None:
        sessions = running.read(SESSIONS)
        end = log_end(sessions, "end_ts")
        found.extend(answer(question, end) for question in probe.questions(running, sessions, end))

    stage = probe.STAGE
    runtime.execute(type(stage)("ask", "", go, stage.reads, (), ()), force=True)
    return found


def look(runtime: Runtime) -> list[Asked]:
    """The labels, users and features of each question."""

    def answer(question: probe.Question, end: datetime) -> Asked:
        return question.labels, *probe.features_of(runtime, runtime.read(SESSIONS), question, Path("m1"), end)

    return ask(runtime, answer)


def test_labels_by_hand_and_no_feature_knows_what_came_after_the_cut(
    make_runtime: Callable[..., Runtime], probed: Probed, tmp_path: Path, model: dict[str, str]
) -> None:
    runtime, cut_off = (make_runtime(*SETTINGS, root=root) for root in (probed.root, tmp_path / "cut_off"))
    put(cut_off, SESSIONS, sessions_of(cut_off, [e for e in log() if e["event_ts"] < CUT or e["user_id"] == "late"]))
    describe_model(cut_off)
    for table in (ITEMS, CONTEXT_VALUES):  # whose numbers depend on the log; those of the whole log are used for both
        shutil.copytree(runtime.path(table), cut_off.path(table))
    ((labels, users, features), _), ((_, same_users, cut_features),) = probed.asked, look(cut_off)

    numbers = range(24)
    expected = {
        "inactive": {f"u{n}": int(not (n % 2 or n % 3 == 0)) for n in numbers},
        "new_vertical": {f"u{n}": int(n % 3 == 0 or (n % 3 == 1 and n % 2 == 1)) for n in numbers},
        "redeem": {f"u{n}": int(n % 3 == 0) for n in numbers},
    }
    found = {task: dict(zip(of["user_id"], of["label"], strict=True)) for task, of in labels.groupby("task")}
    assert found == expected
    assert users == same_users == sorted(expected["redeem"])
    assert features.keys() == cut_features.keys() >= set(probe.FEATURES)
    for name, of_users in features.items():
        assert of_users == pytest.approx(cut_features[name], abs=1e-5), name  # a profile is float32
        assert len(np.unique(of_users, axis=0)) > 1 or name == "majority"


@pytest.fixture(scope="module")
def short_logs(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """Sessions and items of the short logs below: each is of other users, and its test asks only about these."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("short")), spark)
    fill(runtime, [*FIVE, *ABROAD, *PAUSES, *TAKEN, *FORECAST], min_count=5)
    return runtime


FIVE = [
    event("a", 90, amount=3.0),
    event("a", 99.5, "i2", amount=4.0),
    event("a", 99.5, "i3", event_type="view", amount=None),
    event("a", 100, amount=50.0),  # exactly at the cut, so not before it
    event("b", 10, "i2", amount=1.0),
]


def test_five_numbers_and_aggregates_by_hand(short_logs: Runtime, spark: SparkSession) -> None:
    runtime = short_logs
    cuts = spark.createDataFrame([(u, CUT.replace(tzinfo=timezone.utc)) for u in "ab"], "user_id string, cut timestamp")
    events = events_of(runtime.latest(SESSIONS), *profile_users.OF_EVENTS)
    read = events._jdf.queryExecution().sparkPlan().collectLeaves().head().requiredSchema().catalogString()
    assert "time_zone" in read
    assert "event_id" not in read  # most of an event's bytes
    visible = profile_users.before(events, cuts)
    five = {row[0]: tuple(row[1:]) for row in profile_users.rfm(visible, ["purchase"]).collect()}
    log1p = [tuple(math.log1p(x) for x in of) for of in ((0.5, 10, 2, 2, 7), (90, 90, 1, 1, 1))]
    assert five["a"] == pytest.approx(log1p[0])
    assert five["b"] == pytest.approx(log1p[1])

    rows = probe.aggregates(visible, runtime.latest(ITEMS)).where("value > 0").collect()
    counts = {(r.user_id, r.name): round(math.expm1(r.value), 6) for r in rows}
    long_ago = {("b", f"purchase|{what}|ever"): 1 for what in ("all|", "vertical|food", "item_id|i2")}
    assert counts == long_ago | {("a", f"{kind}|{what}|{within}"): n for kind, what, within, n in [
        ("purchase", "all|", 1, 1), ("purchase", "all|", 7, 1), ("purchase", "all|", 30, 2),
        ("purchase", "vertical|food", 1, 1), ("purchase", "vertical|food", 7, 1), ("purchase", "vertical|food", 30, 2),
        ("purchase", "item_id|i2", 1, 1), ("purchase", "item_id|i2", 7, 1), ("purchase", "item_id|i2", 30, 1),
        ("purchase", "item_id|i1", 30, 1),
        ("purchase", "all|", "ever", 2), ("purchase", "vertical|food", "ever", 2),
        ("purchase", "item_id|i1", "ever", 1), ("purchase", "item_id|i2", "ever", 1),
        *[("view", what, d, 1) for what in ("all|", "vertical|food", "item_id|i3") for d in (1, 7, 30, "ever")],
    ]}  # fmt: skip


ABROAD = [  # at 12:00, 12:20 and 22:00 of one Tuesday in New York; the last on a Wednesday in UTC
    event("j", 85 + hours / 24, "i1", time_zone="America/New_York", **values)
    for hours, values in (
        (16, {"amount": 4.0, "quantity": 2.0}),
        (16 + 1 / 3, {"amount": None, "quantity": None, "event_type": "view", "vertical": "rides"}),
        (26, {"amount": 5.0}),
    )
]


def test_statistics_by_hand(short_logs: Runtime, spark: SparkSession) -> None:
    cuts = spark.createDataFrame([("j", CUT.replace(tzinfo=timezone.utc))], "user_id string, cut timestamp")
    visible = profile_users.before(events_of(short_logs.latest(SESSIONS), *profile_users.OF_EVENTS), cuts)
    first, view, last = (15 - hours / 24 for hours in (16, 16 + 1 / 3, 26))  # days before the cut
    amounts = np.log1p([4, 0, 5])
    logs = {f"actions_{d}": 1 if d == 14 else 3 for d in (14, 28, 56, 91, 182)}
    logs |= {f"days_{d}": 1 for d in (14, 28, 56, 91, 182)}
    logs |= {"per_session": 3 / 2, "per_day": 9, "type_purchase": 2, "type_view": 1}
    logs |= {"recency": last, "tenure": first, "actions": 2, "active_days": 2, "amount": 9}  # days of UTC
    plain = {"hour_3": 2 / 3, "hour_5": 1 / 3, "weekday_3": 1, "vertical_food": 2 / 3, "vertical_rides": 1 / 3}
    plain |= {"closeness_purchase": 1 / (1 + math.log1p(last)), "closeness_view": 1 / (1 + math.log1p(view))}
    plain |= {"amount_mean": amounts.mean(), "amount_spread": amounts.std(), "quantity": np.log1p([2, 0, 1]).mean()}
    plain |= {"pause_none_in_28": math.exp(-28 / (first + 1))}  # the other statistics of pauses are 0: there is none
    expected = {name: math.log1p(value) for name, value in logs.items()} | plain
    found = profile_users.statistics(visible, ["purchase"]).where("value != 0").collect()
    assert {row["name"]: row["value"] for row in found} == pytest.approx(expected)
    assert len(found) == len(expected)


PAUSES = [event("c", day) for day in (50, 50.2, 52, 55, 85, 90)]  # days of the log; the pauses: 2, 3, 30, 5
PAUSES += [event("c", 70, event_type="view"), event("d", 95.5)]


def test_pauses_by_hand(short_logs: Runtime, spark: SparkSession) -> None:
    cuts = spark.createDataFrame([(u, CUT.replace(tzinfo=timezone.utc)) for u in "cd"], "user_id string, cut timestamp")
    visible = profile_users.before(events_of(short_logs.latest(SESSIONS), *profile_users.OF_EVENTS), cuts)
    found = {row["user_id"]: row.asDict() for row in profile_users.pauses(visible, ["purchase"]).collect()}
    logs = {"mean": 10, "median": 3, "most": 30, "longest": 30, "spread": np.std([2, 3, 30, 5]), "last": 38 / 3}
    logs |= {"of_28": 1, "longer": 1}
    plain = {"longer_share": 1 / 5, "now_of_median": 10 / 4, "now_of_longest": 10 / 31}
    plain |= {"none_in_28": math.exp(-28 * 5 / 51)}
    expected = {name: math.log1p(value) for name, value in logs.items()} | plain
    assert {name: found["c"][f"pause_{name}"] for name in expected} == pytest.approx(expected)
    alone = dict.fromkeys(expected, 0) | {"now_of_median": 0, "none_in_28": math.exp(-28 / 5.5)}
    assert {name: found["d"][f"pause_{name}"] for name in alone} == pytest.approx(alone)


QUANTITIES = {
    "e": [("i1", 2.0), ("i1", 5.0), ("i1", -1.0), ("i1", None), ("i2", None), ("i3", 0.0)],
    "f": [("i2", 3.0), ("i2", 9.0)],  # the second is after f's cut, and before e's
}
TAKEN = [
    event(user, day, item, quantity=quantity)
    for user, of_user in QUANTITIES.items()
    for day, (item, quantity) in enumerate(of_user)
]


def test_of_an_item_a_profile_hears_how_much_of_it_is_taken_at_once(
    short_logs: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_users = [(u, at.replace(tzinfo=timezone.utc)) for u, at in (("e", CUT), ("f", START + timedelta(days=1)))]
    cuts = spark.createDataFrame(of_users, "user_id string, cut timestamp")
    visible = profile_users.before(events_of(short_logs.latest(SESSIONS), *profile_users.OF_EVENTS), cuts)
    monkeypatch.setattr(short_logs, "read", short_logs.latest)  # which only a stage may do
    with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):  # as if items were too many for Spark's own
        looked_up = visible.join(profile_users.item_numbers(short_logs), "item_id")
        plan = looked_up._jdf.queryExecution().toString()
    assert "Exchange hashpartitioning(item_id" not in plan  # the log is not shuffled
    items = [("i1", 2, 0), ("i2", 3, 0), ("i3", 4, 0)]
    given = (
        visible,
        spark.createDataFrame([(user, [1.0]) for user in "ef"], "user_id string, vector array<float>"),
        spark.createDataFrame(items, "item_id string, item_index int, category int"),
        spark.createDataFrame([], "user_id string, number int, value double"),
    )
    known = spark.createDataFrame([(2,), (4,)], "item_index int")
    for terms, expected in (
        (None, {"e": ([2, 3, 4], [3.5, 0, 0]), "f": ([3], [3])}),
        (known, {"e": ([2, 4], [3.5, 0]), "f": ([], [])}),  # items in the basis
    ):
        rows = profile_users.profile_rows(*given, terms).select("user_id", "items_numbers", "items_values").collect()
        assert {row.user_id: (row.items_numbers, row.items_values) for row in rows} == expected


FORECAST = [event("g", day) for day in (10, 40)] + [event("h", 72)]
FORECAST += [event("g", 75), event("g", 75.5), event("g", 80), event("g", 90, event_type="view"), event("i", 80)]


def test_what_the_forecast_is_fitted_on(short_logs: Runtime, spark: SparkSession) -> None:
    """Statistics of what was known 28 days before the cut, and actions in the 7 and 28 days after that."""
    of_users = [(u, CUT.replace(tzinfo=timezone.utc)) for u in "ghi"]
    cuts = spark.createDataFrame(of_users, "user_id string, cut timestamp")
    visible = profile_users.before(events_of(short_logs.latest(SESSIONS), *profile_users.OF_EVENTS), cuts)
    before, since = profile_users._once(visible, ["purchase"], ("actions", "recency"))
    # The cut is day 100. User h's only event was exactly 28 days before it, and i's came later: g alone was known.
    assert before.toarray() == pytest.approx(np.log1p([[2, 32]]))
    assert since == pytest.approx(np.log1p([[1, 2]]))


def test_the_table_with_labels_of_a_file(
    make_runtime: Callable[..., Runtime], probed: Probed, model: dict[str, str]
) -> None:
    file = probed.labels
    runtime = make_runtime(*SETTINGS, f'probe.labels={{file="{file}"}}', root=probed.root)
    rows = read_delta(runtime.path(PROBES))
    assert {r["task"] for r in rows} == {"inactive", "new_vertical", "redeem", "many"}
    assert {(r["model_version"], r["users"]) for r in rows} == {("m1", 24)}
    assert len(rows) == 4 * len(probe.FEATURES) * 2
    assert all(r["value"] == 0.5 for r in rows if (r["features"], r["metric"]) == ("majority", "auc"))
    assert any(note.startswith("auc, many: vector 0.") for note in probed.notes)
    assert runtime.execute(probe.STAGE).skipped
    asked = probe.STAGE.inputs(runtime)
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *reversed(lines)]) + "\n")
    assert probe.STAGE.inputs(runtime) != asked  # so the stage is not skipped

    file.write_text("user_id,task,label\nu1,many,2\n")
    with pytest.raises(TrailvecError, match=r"neither 0 nor 1 \(task many, users: 1\): correct it"):
        runtime.execute(probe.STAGE)
    model["as_of"] = "2024-04-20T00:00:00.000000"
    with pytest.raises(TrailvecError, match=r"lower probe\.days, or train only up to that time"):
        runtime.execute(probe.STAGE, force=True)


def test_a_task_with_nobody_or_too_few_of_a_label_is_said_and_leaves_no_old_rows(
    make_runtime: Callable[..., Runtime],
    whole: Path,
    tmp_path: Path,
    model: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "labels.csv"
    days = [START + timedelta(days=100 + (n > 0)) for n in range(24)]
    rows = [f"u{n},rare,{n // 23},\nu{n},at once,{n % 2},{day:%Y-%m-%d %H:%M:%S}" for n, day in enumerate(days)]
    file.write_text("\n".join(["user_id,task,label,label_ts", *rows]) + "\n")
    asked = ('probe.activity=["inactive"]', "probe.event_types=[]", f'probe.labels={{file="{file}"}}')
    runtime = make_runtime(*SETTINGS, *asked, 'sequences.target_event_types=["rent"]', root=whole)
    old = [(version, "rare", "vector", "logistic", "auc", 0.9, 0.0, 24, 3) for version in ("m0", "m1")]
    put(runtime, PROBES, runtime.spark.createDataFrame(old, PROBES.schema()))

    made: list[str] = []

    def features(_runtime: Runtime, _sessions: DataFrame, question: probe.Question, *_: Any) -> Any:
        made.extend(question.labels["task"].unique())
        return sorted(f"u{n}" for n in range(24)), {"majority": np.zeros((24, 1))}

    monkeypatch.setattr(probe, "features_of", features)
    report = runtime.execute(probe.STAGE)
    assert report.notes == [
        "inactive is not probed: no user has an event of sequences.target_event_types before the log's last "
        "20 days (probe.days)",
        "rare is not probed: users with its rarer label: 1, fewer than probe.folds = 2",
        "at once is not probed: no fold by label_ts has both labels in its training and its test part",
    ]
    assert [r["model_version"] for r in read_delta(runtime.path(PROBES))] == ["m0"]
    assert made == ["at once"]  # computing the others' would be wasted

    early = [f"u{n},early,{n % 2},2024-02-01 00:00:00" for n in range(24)]  # the model was trained on later events
    file.write_text("\n".join(["user_id,task,label,label_ts", *rows, *early]) + "\n")
    with pytest.raises(TrailvecError, match=r"but a label of early asks about events after 2024-02-01 00:00:00"):
        runtime.execute(probe.STAGE)
    assert made == ["at once"]  # computing another question's features would be wasted


def test_what_is_probed_is_what_profile_users_writes(
    make_runtime: Callable[..., Runtime],
    whole: Path,
    probed: Probed,
    model: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = make_runtime(*SETTINGS, root=whole)
    told, stored = profile_users.statistics, []

    def statistics(visible: DataFrame, targets: list[str]) -> DataFrame:
        stored.append(visible.storageLevel.useDisk)
        return told(visible, targets)

    with monkeypatch.context() as patch:
        patch.setattr(profile_users, "statistics", statistics)
        runtime.execute(profile_users.STAGE)
    assert stored[0]  # read a dozen times, but from the table only once
    assert runtime.count_rows().rows_out == {"user_profiles": 25}
    rows = {r["user_id"]: r for r in read_delta(runtime.path(USER_PROFILES))}
    assert {(r["model_version"], r["as_of"].replace(tzinfo=None)) for r in rows.values()} == {
        ("m1", START + timedelta(days=120))
    }
    _, (_, users, features) = probed.asked
    assert np.stack([rows[user]["vector"] for user in users]) == pytest.approx(features["profile"], abs=1e-6)
    assert len(np.unique(features["profile"], axis=0)) > 20
    assert runtime.execute(profile_users.STAGE).skipped
    basis_of = runtime.models / "m1" / "profile.json"
    about = json.loads(basis_of.read_text())
    assert about.pop("rotation") is None
    write_json(basis_of, about)  # as written by older code
    write_alignment(runtime.models / "m1", np.eye(4, dtype=np.float32), {})

    # A new user arrives: the coordinates keep their meaning, whatever is configured now, and users without new events
    # keep theirs, since the log's end stays.
    came = [event("new", 119.5, "brand new")]
    add(runtime, SESSIONS, sessions_of(runtime, came))
    add(runtime, ITEMS, items_of(runtime, came, build_vocabulary.next_index(runtime.latest(ITEMS))))
    wider = make_runtime(*SETTINGS, "profile.width=32", 'sequences.target_event_types=["redeem"]', root=whole)
    (note, _) = wider.execute(profile_users.STAGE).notes
    assert (
        f"basis in {whole}/models/m1 stays as it was fitted, in spite of profile.width = 32 (it has 64), "
        f"sequences.target_event_types = ['redeem'] (it has []): "
    ) in note
    again = {r["user_id"]: r for r in read_delta(runtime.path(USER_PROFILES))}
    assert again.keys() == rows.keys() | {"new"}
    assert again["u3"]["vector"] == pytest.approx(rows["u3"]["vector"], abs=1e-6)

    tensors_of = basis_of.with_suffix(".safetensors")
    files = {file: file.read_bytes() for file in (basis_of, tensors_of)}
    for file in files:  # as the note says
        file.unlink()
    wider.execute(profile_users.STAGE, force="and run `trailvec profile_users --force`" in note)
    fitted = json.loads(basis_of.read_text())
    assert (fitted["settings"]["width"], fitted["target_event_types"]) == (32, ["redeem"])
    for file, content in files.items():
        file.write_bytes(content)

    write_json(basis_of, about | {"rotation": None})  # fitted before the model was rotated
    # Another run fits a basis while this one fits its own, and another while this one writes its rows.
    unrotated, tensors = basis_of.read_text(), tensors_of.read_bytes()
    others = "another run has fitted a basis of model m1's profiles while this one worked"

    def fit(*given: Any, **more: Any) -> None:
        write_json(basis_of, about | {"sha256": "another"})

    def write(*given: Any) -> None:
        Runtime.write(wider, *given)
        tensors_of.write_bytes(tensors)
        basis_of.write_text(unrotated)

    for where, name, meanwhile in ((profile_users, "fit", fit), (wider, "write", write)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, meanwhile)
            with pytest.raises(TrailvecError, match=others):
                wider.execute(profile_users.STAGE, force=True)
        basis_of.write_text(unrotated)
    put(runtime, CURRENT_MODEL, runtime.spark.createDataFrame([("m0",)], CURRENT_MODEL.schema()))
    note, stale, _ = wider.execute(profile_users.STAGE).notes  # not skipped, though the rows were written
    assert stale.startswith("the profiles of model m0, which is current and which segments use, are not updated: ")
    assert note.startswith("the profile's basis of model m1 is fitted again: `trailvec align` has rotated the model's ")
    fitted = json.loads(basis_of.read_text())
    assert (fitted["rotation"], fitted["settings"]["width"]) == (rotation_sha256(runtime.models / "m1"), 32)


def test_a_model_that_numbers_other_tables_items_makes_no_profile(
    make_runtime: Callable[..., Runtime], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"model_version": "m1", "spec": SPEC.model_dump(), "weights_sha256": ""}
    about |= {"provenance": {"table_ids": {"items": "removed since"}}}
    monkeypatch.setattr(models, "read_about", lambda folder: about)
    with pytest.raises(TrailvecError, match=r"m1 uses the numbers of tables .*: run `trailvec train`"):
        make_runtime(*SETTINGS, root=whole).execute(profile_users.STAGE)


def test_labels_with_times_see_what_came_before_them_and_no_more(
    make_runtime: Callable[..., Runtime], whole: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    """Each user's cut is their label's time, and the earliest of these for users without one; what features see is
    tested above."""
    file = tmp_path / "labels.csv"
    days = {f"u{n}": START + timedelta(days=90 + n % 5) for n in range(3, 24)}
    rows = [f"{user},many,{n % 2},{day:%Y-%m-%d %H:%M:%S}" for n, (user, day) in enumerate(days.items())]
    file.write_text("\n".join(["user_id,task,label,label_ts", *rows]) + "\n")
    asked = ("probe.activity=[]", "probe.event_types=[]", f'probe.labels={{file="{file}"}}')
    runtime = make_runtime(*SETTINGS, *asked, root=whole)
    ((labels, cuts),) = ask(runtime, lambda question, _: (question.labels, question.cuts.collect()))
    times = {user: int(day.replace(tzinfo=timezone.utc).timestamp() * 1_000_000) for user, day in days.items()}
    assert dict(zip(labels["user_id"], labels["cut"], strict=True)) == times
    assert {row.user_id: row.cut for row in cuts} == days | dict.fromkeys(("u0", "u1", "u2"), min(days.values()))
    model["as_of"] = f"{min(days.values()) + timedelta(days=1):%Y-%m-%dT%H:%M:%S.%f}"
    with pytest.raises(
        TrailvecError, match=r"m1 was trained on events up to .*, but a label of many asks about events"
    ):
        runtime.execute(probe.STAGE)


def test_labelled_users_without_events_are_counted(
    make_runtime: Callable[..., Runtime], whole: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    """Four ids are not in the log, and `late` acts only after the label."""
    file = tmp_path / "labels.csv"
    strange = [*(f"U{n}" for n in range(4)), "late"]
    users = [f"u{n}" for n in range(24)]
    rows = [f"{user},many,{user in strange:d},2024-04-10" for user in [*users, *strange]]
    rows += [f"{user},known,1,2024-04-10" for user in users]
    file.write_text("\n".join(["user_id,task,label,label_ts", *rows]) + "\n")
    asked = ("probe.activity=[]", "probe.event_types=[]", f'probe.labels={{file="{file}"}}')
    runtime = make_runtime(*SETTINGS, *asked, root=whole)

    def of_many(question: probe.Question, end: datetime) -> Any:
        if set(question.labels["task"]) == {"many"}:
            return probe.features_of(runtime, runtime.read(SESSIONS), question, Path("m1"), end)
        return question.labels["task"].unique().tolist()

    others, (labelled, features) = ask(runtime, of_many)
    assert others == ["known"]
    (note,) = runtime.report.notes
    assert note.startswith("5 of 29 labelled users of many have no event before their label: ")
    unknown = np.isin(labelled, strange)
    for name, of_users in features.items():
        assert len(np.unique(of_users[unknown], axis=0)) == 1, name


def test_labels_by_a_query_are_asked_again_if_what_it_reads_may_have_changed(
    make_runtime: Callable[..., Runtime], whole: Path, tmp_path: Path
) -> None:
    stage = replace(probe.STAGE, run=lambda running: running.touch(PROBES))
    runtime = make_runtime(root=whole)
    outside = f"delta.`{tmp_path / 'outside'}`"
    runtime.spark.sql(f"CREATE TABLE {outside} USING delta AS SELECT 'u1' AS user_id")

    def skipped(table: str, more: str = "") -> bool:
        query = f"SELECT user_id, 'a' AS task, 1 AS label FROM {table}{more}"
        return make_runtime(f'probe.labels={{sql="{query}"}}', root=whole).execute(stage).skipped

    assert [skipped("flagged_users"), skipped("flagged_users")] == [False, True]
    put(runtime, USER_PROFILES, runtime.spark.createDataFrame([], USER_PROFILES.schema()))  # which it does not read
    assert skipped("flagged_users")
    flag = [("u2", START.date(), "test_account", 1.0)]
    add(runtime, FLAGGED_USERS, runtime.spark.createDataFrame(flag, FLAGGED_USERS.schema()))
    assert [skipped("flagged_users"), skipped("flagged_users")] == [False, True]

    assert not skipped(outside)
    runtime.spark.sql(f"INSERT OVERWRITE {outside} VALUES ('u2')")
    assert not skipped(outside)
    timely = " WHERE current_date() > DATE '2020-01-01'"
    assert [skipped("flagged_users", timely), skipped("flagged_users", timely)] == [False, False]


def test_of_too_many_labelled_users_each_task_keeps_the_first_by_a_hash(
    make_runtime: Callable[..., Runtime], whole: Path, tmp_path: Path
) -> None:
    file = tmp_path / "labels.csv"
    labelled = {"few": [4, 5], "many": range(24), "odd": range(1, 24, 2)}
    rows = [f"u{n},{task},{n % 2}" for task, numbers in labelled.items() for n in numbers]
    file.write_text("\n".join(["user_id,task,label", *rows]) + "\n")
    asked = ("probe.activity=[]", "probe.event_types=[]", "probe.max_users=5", f'probe.labels={{file="{file}"}}')
    runtime = make_runtime(*SETTINGS, *asked, root=whole)
    ((labels, cuts),) = ask(runtime, lambda question, _: (question.labels, question.cuts.collect()))
    hashes = runtime.spark.range(24).select(F.concat(F.lit("u"), "id").alias("user_id"))
    place = {r.user_id: r.hash % 1_000_000 for r in hashes.withColumn("hash", F.xxhash64("user_id")).collect()}
    drawn = {task: sorted((f"u{n}" for n in numbers), key=place.__getitem__)[:5] for task, numbers in labelled.items()}
    assert {task: of["user_id"].tolist() for task, of in labels.groupby("task")} == drawn
    assert {row.user_id for row in cuts} == {user for users in drawn.values() for user in users}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("u1,many,0.99,", r"has a label that is neither 0 nor 1 \(task many, users: 1\): correct it"),
        ("u1,many,1,31.01.2017", "has a label whose label_ts is not a time"),
        ("u1,many,1,49051-01-31", "has a label whose label_ts is not a time"),
        ("u1,many,1,\nu1,many,0,", r"has a label that is given more than once \(task many, users: 1\): correct it"),
        (",many,1,", r"has a label with a blank user_id or task \(task many, users: 1\)"),
        ("u1, ,1,", r"has a label with a blank user_id or task \(task  , users: 1\)"),
        (
            "u1,many,1,2017-01-31",
            "has a label_ts for 1 of the 2 labels of task many: give one for all of them or for none",
        ),
        ("u1,inactive,1,", "has labels of task inactive, which probe.activity or probe.event_types takes from"),
        ("u\xe9,many,1,", "labels.csv is not UTF-8 text: save it as UTF-8"),
    ],
)
def test_a_wrong_label_is_one_sentence(
    make_runtime: Callable[..., Runtime], tmp_path: Path, row: str, said: str
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(f"user_id,task,label,label_ts\nu0,many,0,\n{row}\n", encoding="latin-1")
    runtime = make_runtime('probe.activity=["inactive"]', f'probe.labels={{file="{file}"}}')
    with pytest.raises(TrailvecError, match=said):
        probe.read_labels(runtime, tmp_path / "copies")


def test_nothing_asked_is_said(make_runtime: Callable[..., Runtime], whole: Path, model: dict[str, str]) -> None:
    runtime = make_runtime(root=whole)
    with pytest.raises(TrailvecError, match="there is nothing to probe"):
        runtime.execute(probe.STAGE)
