"""The whole pipeline on four days of Online Retail: every stage run, rerun, killed, and read by other tools."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from rich.console import Console

from jobs import cli
from jobs import train as train_module
from jobs.cli import main, run_stages
from jobs.files import Place
from jobs.model_folders import model_folder
from jobs.pipeline import STAGES
from jobs.runtime import Runtime
from jobs.sql import prepare
from jobs.tables import EVALUATION, FLAGGED_USERS, TABLES, USER_EMBEDDINGS
from scripts.answer_queries import queries
from tests.conftest import make_config, read_delta
from tests.unit.test_evaluation_page import Page
from training.checkpoint import describe_weights, read_about
from training.config import ModelSpec

REPOSITORY = Path(__file__).parents[2]
PERSON = "person-"  # every user id begins with it, and nothing else holds it
KEY = "a key of the tests"
SETTINGS = {
    "storage.database": "online_retail",
    "ingest.data_dir": str(REPOSITORY / "tests/data/online_retail"),
    "ingest.max_rejected_share": 0.6,
    "vocabulary.min_count": 2,
    "sequences.max_length": 16,
    "sequences.split_by": "leave_one_out",  # four days that are months apart: no two cut times suit them
    "train.epochs": 1,
    "train.width": 16,
    "train.heads": 2,
    "train.negatives": 64,
    "neighbours.k": 3,
    # So heavy that it alone ranks a user's earlier items; ties go by index.
    "habit.weight": 1e12,
    "habit.decay": 0.9,
    "spark.master": "local[2]",
}
SEGMENT = """
name = "retail"
owner = "tests"
purpose = "nearest to three customers"
size = 20
seeds = { sql = "SELECT user_id FROM user_embeddings ORDER BY user_id LIMIT 3" }
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("settings")
    segment, mapping = folder / "retail.toml", folder / "online_retail.toml"
    segment.write_text(SEGMENT)
    text = (REPOSITORY / "conf/sources/online_retail.toml").read_text()
    assert "regexp_replace(CustomerID, '[.]0$', '')" in text
    mapping.write_text(text.replace("regexp_replace(CustomerID", f"'{PERSON}' || regexp_replace(CustomerID"))
    values = SETTINGS | {"export.segments": [str(segment)], "ingest.sources": [str(mapping)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAILVEC_EXPORT_KEY", KEY)
        yield [f"{key}={json.dumps(value)}" for key, value in values.items()]


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    """What the command prints while `undisturbed` is built."""
    return io.StringIO()


@pytest.fixture(scope="module")
def undisturbed(
    spark: SparkSession, settings: list[str], said: io.StringIO, tmp_path_factory: pytest.TempPathFactory
) -> Runtime:
    """Every stage, run once."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("undisturbed"), *settings), spark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_out", Console(file=said, width=500))
        run_stages(runtime, STAGES)
    return runtime


def rows(root: Path, table: str) -> list[str]:
    """The table's rows as sorted text, as read by DuckDB."""
    found = read_delta(root / "tables" / table)
    for row in found:
        for by_the_clock in ("exported_at", "refused_on"):
            row.pop(by_the_clock, None)
        row.pop("export_id", None)  # depends on the tables' ids, which differ between warehouses
        row.pop("destination", None)  # below the warehouse
    return sorted(json.dumps(row, default=str) for row in found)


WRITTEN = [table for table in TABLES if table.stage in {stage.name for stage in STAGES}]  # not those of extra stages


def same_rows(one: Path, other: Path) -> None:
    for table in WRITTEN:
        assert rows(one, table.name) == rows(other, table.name), table.name


def test_every_stage_writes_and_then_has_nothing_to_do(undisturbed: Runtime) -> None:
    for table in WRITTEN:
        # No customer of those four days is a bot.
        assert (len(rows(undisturbed.root, table.name)) > 0) == (table != FLAGGED_USERS), table.name
    again = [undisturbed.execute(stage) for stage in STAGES]
    assert [report.stage for report in again if not report.skipped] == []


def test_every_user_has_a_finite_vector_of_the_models_length(undisturbed: Runtime) -> None:
    events = {json.loads(r)["user_id"] for r in rows(undisturbed.root, "events")}
    users = [json.loads(r) for r in rows(undisturbed.root, "user_embeddings")]
    assert sorted(u["user_id"] for u in users) == sorted(events)
    assert all(len(u["vector"]) == 16 and all(map(math.isfinite, u["vector"])) for u in users)


def test_the_popularity_floor_is_what_plain_python_counts(undisturbed: Runtime) -> None:
    items = [json.loads(r) for r in rows(undisturbed.root, "items")]
    by_popularity = sorted(
        (i for i in items if i["train_count"] >= 2), key=lambda i: (-i["target_count"], i["item_index"])
    )
    best = [i["item_index"] for i in by_popularity[:10]]
    per_user = []
    files = DeltaTable(str(undisturbed.root / "tables/sequences")).file_uris()
    for file in (f for f in files if "split=test" in f):
        for row in pq.read_table(file.removeprefix("file://"), partitioning=None).to_pylist():
            (target,) = row["target_item_index"]  # leave-one-out: one item
            per_user.append(1 / math.log2(best.index(target) + 2) if target in best else 0.0)
    found = [json.loads(r) for r in rows(undisturbed.root, "evaluation")]
    wanted = {"task": "next", "method": "popularity", "metric": "ndcg@10", "slice": "all"}
    (row,) = [r for r in found if wanted.items() <= r.items()]
    assert row["counted"] == len(per_user) > 0
    assert row["value"] == pytest.approx(sum(per_user) / len(per_user))


def test_slices_coverage_and_the_space_are_what_plain_python_counts(undisturbed: Runtime) -> None:
    tables = undisturbed.root / "tables"
    items = {i["item_index"]: i for i in read_delta(tables / "items")}
    rankable = [n for n, i in items.items() if i["train_count"] >= 2 and i["target_count"] > 0]
    best = sorted(rankable, key=lambda n: (-items[n]["target_count"], n))[:10]
    expected: dict[tuple[str, str], list[float]] = {}
    bias = []
    for row in read_delta(tables / "sequences"):
        if row["split"] != "test":
            continue
        (target,), (when,) = row["target_item_index"], row["target_ts"]
        hours = max(0.0, (when - row["as_of"]).total_seconds() / 3600)
        lows = [0, 1, 6, 24, 72, 168, 336]
        low = max(bound for bound in lows if bound <= hours)
        value = 1 / math.log2(best.index(target) + 2) if target in best else 0.0
        read = min(row["length"], 15)  # a model reads one action fewer than a row may hold
        names = [("all", "all"), ("history", "1-4" if read < 5 else "5-19")]
        names.append(("hours", "336+" if low == 336 else f"{low}-{lows[lows.index(low) + 1]}"))
        names += [("vertical", items[target]["vertical"])] if target in items else []
        for name in names:
            expected.setdefault(name, []).append(value)
        if target in rankable:
            logs = [math.log(items[n]["target_count"]) for n in best]
            bias.append(sum(logs) / 10 - math.log(items[target]["target_count"]))
    evaluation = read_delta(tables / "evaluation")
    found = {
        (r["slice"], r["slice_value"]): r
        for r in evaluation
        if (r["task"], r["method"], r["metric"]) == ("next", "popularity", "ndcg@10")
    }
    assert {name: r["value"] for name, r in found.items()} == pytest.approx(
        {name: sum(values) / len(values) for name, values in expected.items()}
    )
    assert {name: r["counted"] for name, r in found.items()} == {name: len(v) for name, v in expected.items()}
    assert {kind for kind, _ in found} == {"all", "history", "hours", "vertical"}

    whole = {(r["task"], r["method"], r["metric"]): r for r in evaluation if r["slice"] == "all"}
    assert whole["next", "popularity", "popularity_bias@10"]["value"] == pytest.approx(sum(bias) / len(bias))
    assert whole["next", "popularity", "coverage@10"]["value"] == pytest.approx(10 / len(rankable))
    lead = whole["next", "popularity", "model_lead_ndcg@10"]
    model, floor = whole["next", "model", "ndcg@10"], whole["next", "popularity", "ndcg@10"]
    assert lead["value"] == pytest.approx(model["value"] - floor["value"])
    assert all(r["low"] <= r["value"] <= r["high"] for r in (lead, model, floor))

    vectors = {v["item_id"]: np.array(v["vector"]) for v in read_delta(tables / "item_embeddings") if not v["is_cold"]}
    learnt = [i for n, i in items.items() if n in rankable and i["item_id"] in vectors]
    norms = pd.Series([np.linalg.norm(vectors[i["item_id"]]) for i in learnt]).rank()
    correlation = norms.corr(pd.Series([i["target_count"] for i in learnt]).rank())
    assert whole["space", "items", "norm_popularity"]["value"] == pytest.approx(correlation)
    assert whole["space", "items", "norm_popularity"]["counted"] == len(learnt)

    actions = [event for session in read_delta(tables / "sessions") for event in session["events"]]
    end, month = max(event["event_ts"] for event in actions), timedelta(days=28)
    late, early = (
        [event for event in actions if start - month < event["event_ts"] <= start] for start in (end, end - month)
    )
    of_item = {i["item_id"]: i["first_ts"] for i in items.values()}  # excluding items too rare for the vocabulary
    first = [of_item.get(event["item_id"], end - month) for event in late]
    new = whole["drift", "events", "new_items"]
    assert new["value"] == pytest.approx(sum(time > end - month for time in first) / len(late))
    assert new["counted"] == len(late) < len(actions)
    (rate,) = [r for r in evaluation if (r["task"], r["metric"]) == ("drift", "rate")]  # there is only one vertical
    assert rate["value"] == pytest.approx(len(late) / len(early))
    assert whole["drift", "events", "stability_index"]["value"] == 0


def test_a_habit_is_what_plain_python_sums(undisturbed: Runtime) -> None:
    tables = undisturbed.root / "tables"
    learnt = {v["item_id"] for v in read_delta(tables / "item_embeddings") if not v["is_cold"]}
    items = [i for i in read_delta(tables / "items") if i["item_id"] in learnt and i["target_count"] > 0]
    number = {i["item_id"]: i["item_index"] for i in items}
    actions: dict[str, list[tuple[datetime, str, str]]] = {}
    for session in read_delta(tables / "sessions"):
        own = actions.setdefault(session["user_id"], [])
        own += [(event["event_ts"], event["event_id"], event["item_id"]) for event in session["events"]]
    values = []
    for row in read_delta(tables / "sequences"):
        targets = set(row["target_item_index"] or ()) & set(row["seen_item_index"] or ()) - {1}
        if row["split"] != "test" or not targets:
            continue
        activation: dict[int, float] = {}
        for when, _, item in sorted(actions[row["user_id"]])[:-1]:
            if item in number:
                weeks = max(1.0, (row["as_of"] - when) / timedelta(weeks=1))
                activation[number[item]] = activation.get(number[item], 0) + round(weeks**-0.9, 6)
        best = sorted(activation, key=lambda item: (-np.float32(1e12 * math.log1p(activation[item])), item))[:10]
        (target,) = targets
        values.append(1 / math.log2(best.index(target) + 2) if target in best else 0.0)
    (found,) = [
        row
        for row in read_delta(tables / "evaluation")
        if (row["task"], row["method"], row["metric"], row["slice"]) == ("repeat", "model_and_habit", "ndcg@10", "all")
    ]
    assert found["counted"] == len(values) > 2
    assert sum(values) > 0
    assert found["value"] == pytest.approx(sum(values) / len(values))


def test_the_page_of_the_model_stands_beside_it_and_in_mlflow(undisturbed: Runtime) -> None:
    page = model_folder(undisturbed) / "evaluation.html"
    text = page.read_text()
    assert Page(text).open == []
    assert f"Model {model_folder(undisturbed).name}" in text
    assert [copy.read_text() for copy in undisturbed.root.glob("mlruns/*/artifacts/evaluation.html")] == [text]


def test_the_documented_queries_run_and_give_the_columns_of_their_answers(undisturbed: Runtime) -> None:
    page = (REPOSITORY / "docs/queries.md").read_text()
    prepare(undisturbed)
    somebody = read_delta(undisturbed.path(USER_EMBEDDINGS))[0]["user_id"]
    sections = page.split("\n## ")[1:]
    assert len(sections) == len(queries()) == 10
    for number, (section, (title, text)) in enumerate(zip(sections, queries(), strict=True), 1):
        heading, sql, answer = re.match(r"(.*)\n\n```sql\n(.*?)\n```\n\n(.*)", section, re.DOTALL).groups()  # type: ignore[union-attr]
        assert (heading, sql) == (f"{number}. {title}", text)
        found = undisturbed.spark.sql(text.replace("'1'", f"'{somebody}'"))
        assert found.columns == answer.splitlines()[0].strip("| ").split(" | ")
        # No category of this log has so many items.
        assert found.isEmpty() == ("HAVING count(*) >= 200" in text), title


def test_no_line_log_manifest_report_or_model_names_a_user_or_a_secret(undisturbed: Runtime, said: io.StringIO) -> None:
    root = undisturbed.root
    assert all(row["user_id"].startswith(PERSON) for row in read_delta(root / "tables/events"))
    texts = {"what the command says": said.getvalue().encode()}
    texts |= {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    kinds = ("_delta_log/", "models/", "mlruns/", "mlflow.db", "checkpoints/", "manifest.json")
    assert all(any(kind in name for name in texts) for kind in kinds)  # each kind was searched
    assert re.search(r"score_users .* sequences [1-9].* → .*current_model 1\n", said.getvalue())  # with its row counts

    # Rows belong in tables and exports; compressed, they would hide a name in any case.
    rows = re.compile(r"(tables/(?!.*_delta_log/)|exports/(?!.*(json|html)$)).*")
    open_texts = {name: text for name, text in texts.items() if not rows.fullmatch(name)}
    assert [name for name, text in open_texts.items() if PERSON.encode() in text] == []
    assert [name for name, text in texts.items() if KEY.encode() in text] == []


class Killed(BaseException):
    """Not an Exception: no handler may swallow it, just as nothing survives kill -9."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Dies right after the n-th write that others can see: a commit, a renamed file or folder."""
    left = [0]

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = write(*arguments, **named)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        return wrapped

    for name in ("create", "_save", "merge"):
        monkeypatch.setattr(Runtime, name, dying(getattr(Runtime, name)))
    for name in ("rename", "replace"):  # all JSON, too, is written under another name
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    return lambda writes: left.__setitem__(0, writes)


def test_a_kill_after_a_write_and_the_same_command_end_as_if_nothing_had_happened(
    undisturbed: Runtime,
    spark: SparkSession,
    settings: list[str],
    tmp_path: Path,
    kill_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training processes are killed in test_training_loop.py and in tests/cluster: here the weights are copied."""
    trained = model_folder(undisturbed)

    def train_by_copy(runtime: Runtime, version: str, staging: Path, _: Place) -> None:
        assert version == trained.name
        for name in ("run.json", "model.safetensors", "card.md", "training.svg"):
            shutil.copy(trained / name, staging)
        about = read_about(trained) | {"provenance": runtime.provenance()}
        describe_weights(staging, ModelSpec.model_validate(about.pop("spec")), about)

    monkeypatch.setattr(train_module, "_train", train_by_copy)
    config = make_config(tmp_path / "killed", *settings)
    kills = {}
    for stage in STAGES:
        moments = [1, 2, 4, 8, 16]
        if stage.name == "evaluate":  # its first write, the empty table, comes after all its work: here without it
            Runtime(config, spark).create(EVALUATION)
            moments.remove(1)
        for writes in moments:
            kill_after(writes)
            try:
                Runtime(config, spark).execute(stage)
            except Killed:
                kills[stage.name] = writes
                continue
            break
        kill_after(0)
        Runtime(config, spark).execute(stage)
    assert kills.keys() == {stage.name for stage in STAGES}  # every stage was really killed at least once
    assert min(kills["train"], kills["export_segments"]) >= 2  # also between a model's files, and a segment's
    same_rows(undisturbed.root, tmp_path / "killed")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--conf", "nowhere.toml"], "trailvec: nowhere.toml does not exist: correct the path"),
        (["train", "--set", "train.epoch=3"], "trailvec: the settings: unknown key train.epoch; did you mean epochs?"),
        (["run", "--set", "train.epochs"], "trailvec: --set train.epochs: expected key=value"),
        (["run", "--from", "train", "--to", "ingest"], "trailvec: --from train comes after --to ingest: swap them"),
    ],
)
def test_what_a_user_types_wrong_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(sentence)
    assert "\n" not in said


def test_show_config_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--conf", str(REPOSITORY / "conf/local.toml"), "--set", "train.epochs=2", "--show-config"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["train"]["epochs"] == 2  # --set
    assert shown["sequences"]["target_event_types"] == ["purchase"]  # the overlay
    assert shown["sessionize"]["gap_minutes"] == 30  # the base
