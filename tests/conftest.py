"""One Spark session for the whole run, created lazily: tests that need no JVM start none."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from pyspark.sql import DataFrame, SparkSession

from jobs.config import Config, MaintainSettings, load_config
from jobs.runtime import Runtime, Stage
from jobs.spark_session import start_spark
from jobs.tables import Table
from scripts.faults import delta_reader

# PySpark turns a datetime without a zone, as tests write them, into a time by the zone of this process.
os.environ["TZ"] = "UTC"
time.tzset()

# The first example includes imports and Spark's code generation; a fixture that only creates folders may be shared.
settings.register_profile(
    "trailvec",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("trailvec")

SPARK_CONF = {
    "spark.driver.memory": "3g",
    "spark.ui.enabled": "false",
    # Plan descriptions are built even with the UI off: a twentieth of the driver's time.
    "spark.sql.ui.explainMode": "simple",
    **dict.fromkeys(("spark.ui.retainedJobs", "spark.ui.retainedStages", "spark.sql.ui.retainedExecutions"), "20"),
    "spark.ui.retainedTasks": "200",
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    # Small data, many plans: Spark's code generation (plans to Java) costs more than it saves. Java's optimising
    # compiler pays off in a JVM that lives for the whole run: the same stages take 27 s instead of 34 once it is warm.
    # A collector with its own threads would take cores from the other process. Delta caches the plans of each table it
    # has met for an hour, up to 10,000 of them: at the suite's end the JVM did little but collect garbage.
    "spark.driver.extraJavaOptions": (
        "-XX:ReservedCodeCacheSize=512m -XX:+UseSerialGC -Xms1g -Xmn512m -Ddelta.log.cacheSize=64"
    ),
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


def make_config(root: Path, *sets: str, conf: Path | None = None) -> Config:
    """A configuration with the tests' Spark settings and its tables under `root`."""
    config = load_config(conf, [f'storage.root="{root}"', *sets])
    return config.model_copy(
        update={"spark": config.spark.model_copy(update={"master": "local[2]", "conf": SPARK_CONF})}
    )


# Minutes each. pytest-xdist hands out files in collection order: the long ones first, so that both processes end at
# about the same time.
LONG = (
    "test_pipeline",
    "test_yarn",
    "test_object_store",
    "test_faults",
    "test_erase_users",
    "test_training_loop",
    "test_export_segments",
    "test_probe",
    "test_ingest_increments",
    "test_score_users",
    "test_train_and_score",
    "test_build_sequences",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _all_floats() -> Iterator[None]:
    """Training in this process makes it flush denormal numbers; other tests need them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="module")
def _frames_let_go() -> Iterator[None]:
    """A runtime and its frames form reference cycles. Python collects cycles less often the more objects it holds, and
    the JVM keeps the plans meanwhile: at the suite's end it had 1,700 of them, and did little but collect garbage."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    session = start_spark(make_config(tmp_path_factory.mktemp("spark")))
    yield session
    session.stop()


@pytest.fixture
def make_runtime(spark: SparkSession, tmp_path: Path) -> Callable[..., Runtime]:
    """Makes runtimes over this test's own folder (or `root`), with `a.b=c` settings."""

    def make(*sets: str, root: Path | None = None, conf: Path | None = None) -> Runtime:
        return Runtime(make_config(root or tmp_path / "warehouse", *sets, conf=conf), spark)

    return make


def expired(runtime: Runtime) -> Runtime:
    """The runtime with a retention of zero, which no configuration may have."""
    none = MaintainSettings.model_construct(retention_hours=0, target_file_mb=1)
    return Runtime(runtime.config.model_copy(update={"maintain": none}), runtime.spark)


def put(runtime: Runtime, table: Table, rows: DataFrame) -> None:
    """Makes `rows` the content of the table, as the stage that writes it would."""
    runtime.execute(Stage("put", "", lambda r: r.write(table, rows), reads=(), writes=(), settings=()), force=True)


def add(runtime: Runtime, table: Table, rows: DataFrame) -> None:
    """Appends `rows` to the table, as an increment of the stage that writes it would."""
    runtime.execute(Stage("add", "", lambda r: r.append(table, rows), reads=(), writes=(), settings=()), force=True)


def read_delta(path: str | Path) -> list[dict[str, Any]]:
    """A Delta table's rows, as read by DuckDB."""
    connection = delta_reader()
    connection.execute("SET TimeZone = 'UTC'")
    return connection.execute("SELECT * FROM delta_scan(?)", [str(path)]).fetch_arrow_table().to_pylist()
