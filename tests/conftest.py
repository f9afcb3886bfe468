"""One lazy Spark session for the whole run: no test that needs no JVM starts one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from pyspark.sql import DataFrame, SparkSession

from jobs.config import Config, load_config
from jobs.runtime import QUIET, Runtime, Stage, start_spark
from jobs.tables import Table
from scripts.faults import delta_reader

# The first example pays for imports and for Spark's code generation; a fixture that only makes folders may be shared.
settings.register_profile(
    "trailvec",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("trailvec")

SPARK_CONF = {
    "spark.driver.memory": "2g",
    "spark.ui.enabled": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    # Small data, many plans: compilers cost more than they save, Spark's own (to Java) and Java's optimising one. With
    # the latter off Java takes 48 MB for compiled code, which a thousand plans fill: it then compiles nothing at all.
    "spark.driver.extraJavaOptions": f"{QUIET} -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=512m",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


def make_config(root: Path, *sets: str, conf: Path | None = None) -> Config:
    """A configuration whose tables lie under `root`, with the tests' Spark settings."""
    config = load_config(conf, [f'storage.root="{root}"', *sets])
    return config.model_copy(
        update={"spark": config.spark.model_copy(update={"master": "local[2]", "conf": SPARK_CONF})}
    )


@pytest.fixture(autouse=True)
def _all_floats() -> Iterator[None]:
    """Training that runs in this process makes it flush denormal numbers; other tests want them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    session = start_spark(make_config(tmp_path_factory.mktemp("spark")))
    yield session
    session.stop()


@pytest.fixture
def make_runtime(spark: SparkSession, tmp_path: Path) -> Callable[..., Runtime]:
    """Runtimes over this test's own folder (or `root`), with `a.b=c` settings."""

    def make(*sets: str, root: Path | None = None, conf: Path | None = None) -> Runtime:
        return Runtime(make_config(root or tmp_path / "warehouse", *sets, conf=conf), spark)

    return make


def put(runtime: Runtime, table: Table, rows: DataFrame) -> None:
    """Makes `rows` the table's rows, as the stage that writes it would."""
    runtime.execute(Stage("put", "", lambda r: r.write(table, rows), reads=(), writes=(), settings=()), force=True)


def read_delta(path: str | Path) -> list[dict[str, Any]]:
    """A Delta table's rows as DuckDB reads them."""
    connection = delta_reader()
    connection.execute("SET TimeZone = 'UTC'")
    return connection.execute("SELECT * FROM delta_scan(?)", [str(path)]).fetch_arrow_table().to_pylist()
