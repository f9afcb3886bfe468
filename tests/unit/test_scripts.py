"""The benchmarks and scripts as far as they run without Spark: their help, what is wrong with a command, their sums."""

from __future__ import annotations

import glob
import runpy
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.config import Config
from jobs.evaluation_page import METHODS
from scripts import check_page, demo
from scripts.answer_queries import _cell
from scripts.bench.measure import cpu_seconds, exponent, in_turns

BENCH = Path("scripts/bench")
# They import Transformers4Rec, which takes longer than all the others together.
SLOW = {"catalogue.py", "score.py", "score_increments.py", "train.py"}
SCRIPTS = sorted(
    path
    for path in (*BENCH.glob("*.py"), *Path("scripts").glob("*.py"))
    if "parse_args(" in path.read_text() and path.name not in SLOW
)


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> str | int | None:
    """What a script ends with, in this process: the modules that all of them import are imported once."""
    monkeypatch.syspath_prepend(BENCH.absolute())
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, path, "--help") == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["scripts/answer_queries.py", "--conf", "nowhere.toml"], "nowhere.toml"),
        (["scripts/bench/probes.py", "--conf", "nowhere.toml"], "nowhere.toml"),
        (["scripts/bench/probes.py", "--conf", "conf/local.toml", "--quick"], "two seeds: leave it out"),
        (["scripts/bench/quality.py", "--events", "nowhere", "--seeds", "0"], "train at least one model"),
        (["scripts/bench/train.py", "--only", "in memory"], "name both"),
        (["scripts/bench/sessionize.py", "--only", "window"], "invalid choice: 'window'"),
        (["scripts/faults.py", "kills", "--data", "nowhere"], "holds no *.csv"),
    ],
)
def test_a_wrong_path_or_name_is_one_sentence(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, Path(command[0]), *command[1:])
    line = (capsys.readouterr().err.strip() or str(code)).splitlines()[-1]
    assert code, code
    assert said in line, line
    assert "unexpected" not in line, line


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    assert exponent([(n, 3 * n**1.5) for n in (10.0, 100.0, 5000.0)]) == pytest.approx(1.5)


def test_one_size_has_no_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH.absolute())
    growth = runpy.run_path(str(BENCH / "scale.py"))["growth"]
    assert growth([(10.0, 1.0)], "") == growth([(10.0, 1.0), (10.0, 1.1)], "") == {}
    assert growth([(10.0, 1.0), (100.0, 10.0)], "_ingest") == pytest.approx(
        {"exponent_ingest": 1.0, "exponent_last_ingest": 1.0}
    )


def test_a_log_of_any_name_and_columns_has_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH.absolute())
    quality = runpy.run_path(str(BENCH / "quality.py"))
    log = tmp_path / 'log "a" [1] \U0001f600.parquet'
    odd = ["it's", 'so-called "id"']
    columns = ["event_id", "user_id", "item_id", "event_ts", *odd]
    pq.write_table(pa.table({name: ["x"] for name in columns}), log)
    (given,) = tomllib.loads(quality["mapping"](log))["input"]
    assert given["ignore"] == odd
    assert glob.glob(given["path"], root_dir=tmp_path) == [log.name]


def test_cpu_seconds_are_of_this_process_and_of_running_and_ended_ones_below() -> None:
    def work(seconds: float) -> str:
        return f"import time\nwhile time.process_time() < {seconds}: pass"

    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", work(0.2)], check=True)
    ended = cpu_seconds()
    exec(work(time.process_time() + 0.2))
    assert ended - before >= 0.15
    assert cpu_seconds() - ended >= 0.15
    others = cpu_seconds() - time.process_time()
    waiting = work(0.2) + "\nimport sys\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE):
        until = time.monotonic() + 30
        while cpu_seconds() - time.process_time() - others < 0.15:
            assert time.monotonic() < until


def test_contestants_take_turns_and_warm_ones_are_not_counted() -> None:
    done: list[object] = []
    acts = {name: lambda name=name: done.append(name) for name in ("a", "b")}
    clock, cpu = in_turns(acts, 2, warm=1, before=done.append)
    assert done == [0, "a", "b", 1, "a", "b", 2, "a", "b"]
    assert [(name, len(seconds)) for times in (clock, cpu) for name, seconds in times.items()] == [
        ("a", 2),
        ("b", 2),
    ] * 2


def test_a_boolean_in_an_answer_is_no_number() -> None:
    assert [_cell(value) for value in (True, False, 1200, None)] == ["true", "false", "1,200", ""]


# Asks for one address of each way to look at the page.
CHROMIUM = """#!/bin/sh
for word; do
  case $word in
    --screenshot=*|--print-to-pdf=*) way=$(basename "${word#*=}") ;;
    --log-net-log=*) log=${word#*=} ;;
    --dump-dom) echo '<body data-width="360">' ;;
  esac
done
[ -z "$log" ] ||
  echo '{"events": [{"params": {"initiator": "file://", "url": "http://far.away/'$way'"}}]}' >"$log"
"""


@pytest.fixture
def looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page and a program that opens it."""
    browser, page = tmp_path / "chromium", tmp_path / "page.html"
    browser.write_text(CHROMIUM)
    browser.chmod(0o755)
    page.touch()
    command = ["check_page.py", str(page), "--out", str(tmp_path / "out"), "--chromium", str(browser)]
    monkeypatch.setattr(sys, "argv", command)
    return browser


def test_what_any_way_to_look_at_a_page_asks_for_is_told(looked_at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_page.main()
    asked = [line for line in capsys.readouterr().err.splitlines() if line.startswith("requested")]
    assert asked == [f"requested http://far.away/{way}" for way in ("phone.png", "print.pdf", "screen.png")]
    assert ended.value.code == 1


def test_a_browser_that_hangs_is_told(looked_at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(check_page, "LONGEST", 0.2)
    with pytest.raises(SystemExit, match=r"chromium took longer than 0\.2 s over file://"):
        check_page.main()


def test_the_demo_shows_the_split_that_the_configuration_evaluates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite answers its query, over a table with the rows of both splits, and of another model."""
    table = sqlite3.connect(":memory:")
    table.row_factory = lambda cursor, row: SimpleNamespace(
        **{of[0]: v for of, v in zip(cursor.description, row, strict=True)}
    )
    table.execute("CREATE TABLE evaluation (model_version, split, task, method, metric, slice, value, counted)")
    metrics = ("ndcg@10", "recall@10", "ndcg@20", "recall@20", "mrr@20")
    for model, split, value, users in (("m", "test", 0.25, 77), ("m", "valid", 0.75, 88), ("n", "test", 0.5, 99)):
        rows = [
            (model, split, task, method, metric, "all", value, users)
            for task in demo.TASKS
            for method in METHODS
            for metric in metrics
        ]
        table.executemany(f"INSERT INTO evaluation VALUES ({', '.join('?' * 8)})", rows)
    monkeypatch.setattr(demo, "register_tables", lambda runtime: None)
    monkeypatch.setattr(demo, "screen", Console(width=160))
    spark = SimpleNamespace(sql=lambda text, values: SimpleNamespace(collect=table.execute(text, values).fetchall))
    runtime: Any = SimpleNamespace(config=Config(), spark=spark)
    demo.show_ranking(runtime, "m")
    said = capsys.readouterr().out
    assert said.count("77 users") == len(demo.TASKS)
    assert said.count("0.2500") == len(demo.TASKS) * len(METHODS) * len(metrics)
    assert "0.7500" not in said
