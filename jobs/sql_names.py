"""Registers the tables, and views of the current model's rows, by name for SQL."""

from __future__ import annotations

import json
import re
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from jobs.errors import TrailvecError
from jobs.runtime import Runtime
from jobs.spark_session import spark_conf
from jobs.tables import CURRENT, CURRENT_MODEL, TABLES, Table

_REGISTERED = "spark.trailvec.registered"  # what is registered in the session's catalogue
# By default Delta doesn't put a table's columns into the catalogue, where JDBC's getColumns looks for them. (Set only
# during registration: on writes by name it would start threads that outlive the commit.)
_WITH_COLUMNS = {"spark.databricks.delta.catalog.update.enabled": "true"}
_REFUSED = re.compile(r"AccessControlException: Permission denied|AccessDeniedException: ")  # HDFS; S3 and Azure
_DETAILS = re.compile(r"^(?:Created Time|Type|Provider|Location|View Text): .*", re.MULTILINE)
_VIEWS = "spark.trailvec.views"  # the names of the session's temporary views, in a volume
_VOLUMES = "/Volumes"  # where Databricks mounts Unity Catalog volumes


def register_tables(runtime: Runtime) -> None:
    """Registers all existing tables, and the views of the current model's rows, in `storage.database` and switches to
    it. Leaves alone those that are registered already, unless they have been dropped or replaced since.

    Raises:
        TrailvecError: the database has somebody else's table of such a name.
    """
    spark, database = runtime.spark, runtime.config.storage.database
    seen = tables_to_see(runtime)
    existing = [table for table in TABLES if seen[table.name]]
    in_volume = isinstance(runtime.place, Path) and runtime.place.is_relative_to(_VOLUMES)
    _register_views(runtime, existing if in_volume else [])
    if in_volume:
        return
    views = {view: table for view, table in CURRENT.items() if table in existing and CURRENT_MODEL in existing}
    if not spark.catalog.databaseExists(database):
        spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")  # the config has validated the name
    spark.catalog.setCurrentDatabase(database)
    # A name may still mean a table under another root.
    root, registered_before = json.loads(spark.conf.get(_REGISTERED, None) or "[[], {}]")
    here, entries = [str(runtime.place), database], _catalogue_entries(spark, database)
    same = {name for name, of in entries.items() if root == here and registered_before.get(name) == of}
    tables = [table for table in existing if table.name not in same]
    new = {view: table for view, table in views.items() if view not in same}

    def is_gone(table: Table) -> bool:
        # Asked again: another process may have created and registered it since the first look.
        return seen[table.name] is False and not runtime.exists(table)

    gone = [table for table in TABLES if _is_of_a_root(table, entries) and is_gone(table)]
    old = [view for view, table in CURRENT.items() if view in entries and (is_gone(table) or is_gone(CURRENT_MODEL))]
    if not tables and not old and not new and not gone:
        return
    for table in tables:
        if table.name in entries and not _is_of_a_root(table, entries):
            raise TrailvecError(
                f"database {database} already has another table {table.name}: choose another storage.database"
            )
    for table in gone:
        spark.sql(f"DROP TABLE IF EXISTS `{database}`.{table.name}")  # external: its files stay
    for table in tables:  # each at once: other clients of a lasting catalogue miss one name for a moment, not all
        spark.sql(f"DROP TABLE IF EXISTS `{database}`.{table.name}")
        with spark_conf(spark, _WITH_COLUMNS):
            spark.catalog.createTable(table.name, path=runtime.path(table), source="delta")
    for view in old:
        spark.sql(f"DROP VIEW IF EXISTS `{database}`.{view}")
    for view, table in new.items():
        spark.sql(f"CREATE OR REPLACE VIEW `{database}`.{view} AS {_current_rows(table, f'`{database}`.')}")
    ours = {table.name for table in existing} | views.keys()
    registered = {name: of for name, of in _catalogue_entries(spark, database).items() if name in ours}
    spark.conf.set(_REGISTERED, json.dumps([here, registered]))


def _is_of_a_root(table: Table, entries: dict[str, list[str]]) -> bool:
    """Whether the catalogue's table of that name is one of ours, of this root or another, so that we may drop it. (A
    managed one never is, and would be dropped with its files.)"""
    details = entries.get(table.name, [])
    ours = {"Type: EXTERNAL", "Provider: delta"} <= set(details)
    return ours and any(re.fullmatch(f"Location: .*/tables/{table.name}", line) for line in details)


def tables_to_see(runtime: Runtime) -> dict[str, bool | None]:
    """By name, whether each of TABLES exists; None if this user may not read its folder (e.g. exports, for an analyst).

    Raises:
        PySparkException, Py4JJavaError: no table is visible and access to a folder is denied (e.g. wrong keys); or the
            store fails.
    """
    seen: dict[str, bool | None] = {}
    refused = None
    for table in TABLES:
        try:
            seen[table.name] = runtime.exists(table)
        except (PySparkException, Py4JJavaError) as error:
            if not _REFUSED.search(str(error)):
                raise
            seen[table.name], refused = None, error
    if refused and not any(seen.values()):
        raise refused
    return seen


def _catalogue_entries(spark: SparkSession, database: str) -> dict[str, list[str]]:
    """What the catalogue says of each of our names: its type, format, location or query, and creation time. Dropped
    ones are missing."""
    names = "|".join([*(table.name for table in TABLES), *CURRENT])
    rows = spark.sql(f"SHOW TABLE EXTENDED IN `{database}` LIKE '{names}'").where("NOT isTemporary").collect()
    return {row.tableName: _DETAILS.findall(row.information) for row in rows}


def _register_views(runtime: Runtime, existing: list[Table]) -> None:
    """As `register_tables`, but with temporary views: Unity Catalog accepts no tables whose files are in a volume.
    Drops those of earlier calls, maybe for another root, that are not there."""
    spark = runtime.spark
    views = {table.name: f"SELECT * FROM {runtime.sql_name(table)}" for table in existing}  # noqa: S608 - our own names
    if CURRENT_MODEL in existing:
        views |= {view: _current_rows(table) for view, table in CURRENT.items() if table in existing}
    for name in set(json.loads(spark.conf.get(_VIEWS, None) or "[]")) - views.keys():
        spark.catalog.dropTempView(name)
    for name, rows in views.items():
        spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW {name} AS {rows}")
    spark.conf.set(_VIEWS, json.dumps(list(views)))


def _current_rows(table: Table, database: str = "") -> str:
    """A query for the current model's rows; `database`: a prefix that ends in a dot, or empty for session views."""
    current = f"(SELECT model_version FROM {database}{CURRENT_MODEL.name})"  # noqa: S608 - our own names
    return f"SELECT * FROM {database}{table.name} WHERE model_version = {current}"  # noqa: S608
