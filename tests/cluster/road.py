"""The road to `build_sequences` that the tests of this folder take on other stores, and what it must end in."""

from __future__ import annotations

import json
from pathlib import Path

from pyspark.sql import SparkSession

from jobs.cli import run_stages
from jobs.pipeline import STAGES
from jobs.runtime import Runtime
from scripts.faults import delta_reader, differences
from tests.conftest import make_config

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/data/online_retail"
ROAD = STAGES[: [stage.name for stage in STAGES].index("build_sequences") + 1]
TABLES = [table.name for stage in ROAD for table in stage.writes]
# Rules that catch users and cut sessions on these days too, so that every stage has something to write.
SETTINGS = {
    "ingest.sources": ["conf/sources/online_retail.toml"],
    "ingest.max_rejected_share": 1.0,
    "flag_users.events_per_minute": 40,
    "sessionize.max_events": 50,
    "vocabulary.min_count": 2,
    "sequences.max_length": 64,
}


def run_here(spark: SparkSession, root: Path) -> None:
    """The same stages, over local files."""
    sets = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    config = make_config(root, *sets, f'ingest.data_dir="{DATA}"', conf=REPOSITORY / "conf/base.toml")
    run_stages(Runtime(config, spark), ROAD)


def same_tables(expected: Path, found: Path) -> None:
    for table in TABLES:
        rows = delta_reader().execute(f"SELECT count(*) FROM delta_scan('{found}/tables/{table}')").fetchall()[0][0]
        assert rows > 0, table
    # A refused record is told with its file, which lies elsewhere.
    assert differences(expected, found, TABLES, {"rejected_events": "file"}) == dict.fromkeys(TABLES, 0)
