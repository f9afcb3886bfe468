"""The pipeline up to `build_sequences` that this folder's tests run on other stores, and its expected results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs.cli import run_stages
from jobs.erase_users import HOLDING_USERS
from jobs.model_folders import model_folder
from jobs.pipeline import STAGES
from jobs.runtime import Runtime
from scripts.faults import delta_reader, differences
from tests.conftest import make_config
from training.checkpoint import read_about

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/data/online_retail"
ROAD = STAGES[: [stage.name for stage in STAGES].index("build_sequences") + 1]
TABLES = [table.name for stage in ROAD for table in stage.writes]
# Rules strict enough to flag users and cut sessions on these days, so that every stage has something to write.
SETTINGS = {
    "ingest.sources": ["conf/sources/online_retail.toml"],
    "ingest.max_rejected_share": 1.0,
    "flag_users.events_per_minute": 40,
    "sessionize.max_events": 50,
    "vocabulary.min_count": 2,
    "sequences.max_length": 64,
}


def run_here(spark: SparkSession, root: Path) -> None:
    """Runs the same stages over local files."""
    sets = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    config = make_config(root, *sets, f'ingest.data_dir="{DATA}"', conf=REPOSITORY / "conf/base.toml")
    run_stages(Runtime(config, spark), ROAD)


def same_tables(expected: Path, found: Path) -> None:
    for table in TABLES:
        rows = delta_reader().execute(f"SELECT count(*) FROM delta_scan('{found}/tables/{table}')").fetchall()[0][0]
        assert rows > 0, table
    # A rejected record names its file, whose path differs here.
    assert differences(expected, found, TABLES, {"rejected_events": "file, refused_on"}) == {}


def some_users(root: Path, count: int = 3) -> list[str]:
    """Users who have sequences, and so may have rows in every table of ROAD that holds users."""
    query = f"SELECT DISTINCT user_id FROM delta_scan('{root}/tables/sequences') ORDER BY user_id LIMIT {count}"
    return [user for (user,) in delta_reader().execute(query).fetchall()]


def holding(root: Path, users: list[str]) -> set[str]:
    """The tables with a Parquet file, of any version, that holds one of the users."""
    tables = set()
    for table in HOLDING_USERS:
        files = [
            str(file) for file in (root / "tables" / table.name).rglob("*.parquet") if "_delta_log" not in file.parts
        ]
        for name in table.user_columns() if files else ():
            query = f"SELECT count(*) FROM read_parquet(?, union_by_name = true) WHERE {name} IN (SELECT unnest(?))"
            if delta_reader().execute(query, [files, users]).fetchall()[0][0]:
                tables.add(table.name)
    return tables


def is_forgotten(report: dict[str, Any], before: Path, after: Path, users: list[str]) -> None:
    """Checks what forget.py reported, and the files before and after it."""
    held = holding(before, users)
    assert {"events", "sessions", "sequences"} <= held
    assert {name for name, rows in report["rows"].items() if rows} == held
    assert (report["early"], report["finished"]) == ({"finished": 0}, {"finished": 1})
    assert holding(after, users) == set()
    for name, entry in report["upkeep"].items():
        if name == "erasures":  # written to since then
            continue
        is_kept_up(entry, after / "tables" / name)
        if name in held:
            assert entry["bytes_freed"] > 0, name
    assert {"erasures", "erased_users", *held} <= report["upkeep"].keys()


def is_kept_up(entry: dict[str, Any], folder: Path) -> None:
    """Checks what maintain_tables reported of a table; `folder` is the table's, or a copy."""
    active = pa.table(DeltaTable(str(folder)).get_add_actions(flatten=True)).to_pydict()
    assert (entry["rows"], entry["rows_hidden"]) == (sum(active["num_records"]), 0), folder
    assert (entry["files"], entry["bytes"]) == (len(active["path"]), sum(active["size_bytes"])), folder
    files = [file for file in folder.rglob("*") if file.is_file() and "_delta_log" not in file.parts]
    assert entry["bytes_on_disk"] == sum(file.stat().st_size for file in files if file.name[0] != "."), folder


def train_here(root: Path, here: Path, spark: SparkSession, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains without interruption, with horovodrun, over a copy of root's tables in `here`; returns model.json."""
    sets = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    shutil.copytree(root / "tables", here / "tables")
    runtime = Runtime(make_config(here, *sets, 'train.launcher="local"', conf=REPOSITORY / "conf/base.toml"), spark)
    run_stages(runtime, [stage for stage in STAGES if stage.name == "train"])
    return read_about(model_folder(runtime))
