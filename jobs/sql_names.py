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
_REFUSED = re.compile(r"AccessControlException: Permission denied|AccessDeniedException: s3a://")
_VOLUMES = "/Volumes"  # where Databricks mounts Unity Catalog volumes


def register_tables(runtime: Runtime) -> None:
    """Registers all existing tables, and the views of the current model's rows, in `storage.database` and switches to
    it. Registers nothing if all of them already are and none has been dropped since.

    Raises:
        TrailvecError: the database has a managed table of such a name; dropping it would delete its files.
    """
    spark, database = runtime.spark, runtime.config.storage.database
    there = _tables_to_see(runtime)
    if isinstance(runtime.place, Path) and runtime.place.is_relative_to(_VOLUMES):
        _register_views(runtime, there)
        return
    views = {view: table for view, table in CURRENT.items() if table in there and CURRENT_MODEL in there}
    names = {table.name for table in there} | views.keys()
    known = json.dumps([str(runtime.place), database, [table.name for table in there]])
    if spark.conf.get(_REGISTERED, "") == known and names <= _names_in(spark, database):
        spark.catalog.setCurrentDatabase(database)
        return
    spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")  # the config has validated the name
    spark.catalog.setCurrentDatabase(database)
    for table in there:
        name = f"`{database}`.{table.name}"
        if spark.catalog.tableExists(name) and spark.catalog.getTable(name).tableType == "MANAGED":
            raise TrailvecError(
                f"database {database} has a table {table.name} of its own: choose another storage.database"
            )
    for table in there:
        # Always recreated: the name may still refer to a table under another root.
        spark.sql(f"DROP TABLE IF EXISTS `{database}`.{table.name}")  # external: its files stay
        with spark_conf(spark, _WITH_COLUMNS):
            spark.catalog.createTable(table.name, path=runtime.path(table), source="delta")
    for view in CURRENT:
        spark.sql(f"DROP VIEW IF EXISTS `{database}`.{view}")
    for view, table in views.items():
        spark.sql(f"CREATE VIEW `{database}`.{view} AS {_current_rows(table, f'`{database}`.')}")
    spark.conf.set(_REGISTERED, known)


def _tables_to_see(runtime: Runtime) -> list[Table]:
    """The existing tables, except those whose folders this user may not read (e.g. exports, for an analyst).

    Raises:
        PySparkException, Py4JJavaError: no table is visible and access to a folder is denied (e.g. wrong keys); or the
            store fails.
    """
    found, refused = [], None
    for table in TABLES:
        try:
            if runtime.exists(table):
                found.append(table)
        except (PySparkException, Py4JJavaError) as error:
            if not _REFUSED.search(str(error)):
                raise
            refused = error
    if refused and not found:
        raise refused
    return found


def _names_in(spark: SparkSession, database: str) -> set[str]:
    """The tables and views in the database; empty if it has been dropped."""
    if not spark.catalog.databaseExists(database):
        return set()
    return {row.tableName for row in spark.sql(f"SHOW TABLES IN `{database}`").collect()}


def _register_views(runtime: Runtime, there: list[Table]) -> None:
    """As `register_tables`, but with temporary views: Unity Catalog accepts no tables whose files are in a volume."""
    for table in there:
        rows = f"SELECT * FROM {runtime.sql_name(table)}"  # noqa: S608 - our own names
        runtime.spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW {table.name} AS {rows}")
    for view, table in CURRENT.items():
        if table in there and CURRENT_MODEL in there:
            runtime.spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW {view} AS {_current_rows(table)}")


def _current_rows(table: Table, database: str = "") -> str:
    """A query for the current model's rows; `database`: a prefix that ends in a dot, or empty for session views."""
    current = f"(SELECT model_version FROM {database}{CURRENT_MODEL.name})"  # noqa: S608 - our own names
    return f"SELECT * FROM {database}{table.name} WHERE model_version = {current}"  # noqa: S608
