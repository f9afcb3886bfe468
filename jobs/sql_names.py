"""The names by which SQL knows the tables, and the views of the current model's rows."""

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

_REGISTERED = "spark.trailvec.registered"  # what the session's catalogue knows by name
# Delta leaves a table's columns out of the catalogue, where JDBC's getColumns looks for them. (Only as a table is made
# known: where rows are written by a name it would start threads that go on after the commit.)
_WITH_COLUMNS = {"spark.databricks.delta.catalog.update.enabled": "true"}
_REFUSED = re.compile(r"AccessControlException: Permission denied|AccessDeniedException: s3a://")
_VOLUMES = "/Volumes"  # where Databricks mounts the volumes of Unity Catalog


def register_tables(runtime: Runtime) -> None:
    """Makes every existing table, and the views of the current model's rows, known to SQL by their names, in
    `storage.database`, and uses that database. Does nothing where they are known already, and by nobody dropped since.

    Raises:
        TrailvecError: the database has a table of such a name whose files are its own: dropped, they would be gone.
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
    spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")  # the name's pattern is checked by the config
    spark.catalog.setCurrentDatabase(database)
    for table in there:
        name = f"`{database}`.{table.name}"
        if spark.catalog.tableExists(name) and spark.catalog.getTable(name).tableType == "MANAGED":
            raise TrailvecError(
                f"database {database} has a table {table.name} of its own: choose another storage.database"
            )
    for table in there:
        # Anew each time: the name may still mean a table under another root.
        spark.sql(f"DROP TABLE IF EXISTS `{database}`.{table.name}")  # external: its files stay
        with spark_conf(spark, _WITH_COLUMNS):
            spark.catalog.createTable(table.name, path=runtime.path(table), source="delta")
    for view in CURRENT:
        spark.sql(f"DROP VIEW IF EXISTS `{database}`.{view}")
    for view, table in views.items():
        spark.sql(f"CREATE VIEW `{database}`.{view} AS {_current_rows(table, f'`{database}`.')}")
    spark.conf.set(_REGISTERED, known)


def _tables_to_see(runtime: Runtime) -> list[Table]:
    """The tables that exist, without those whose folders this user may not look into (an analyst: exports, say).

    Raises:
        PySparkException, Py4JJavaError: no table is to be seen, and a folder may not be looked into (wrong keys, say);
            or the store fails.
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
    """The tables and views that a database has; none where somebody dropped it."""
    if not spark.catalog.databaseExists(database):
        return set()
    return {row.tableName for row in spark.sql(f"SHOW TABLES IN `{database}`").collect()}


def _register_views(runtime: Runtime, there: list[Table]) -> None:
    """The same by temporary views of the session: Unity Catalog takes no table whose files lie in a volume."""
    for table in there:
        rows = f"SELECT * FROM {runtime.sql_name(table)}"  # noqa: S608 - our own names
        runtime.spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW {table.name} AS {rows}")
    for view, table in CURRENT.items():
        if table in there and CURRENT_MODEL in there:
            runtime.spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW {view} AS {_current_rows(table)}")


def _current_rows(table: Table, database: str = "") -> str:
    """The query of the current model's rows; `database`: with a dot, where the tables are not the session's own."""
    current = f"(SELECT model_version FROM {database}{CURRENT_MODEL.name})"  # noqa: S608 - our own names
    return f"SELECT * FROM {database}{table.name} WHERE model_version = {current}"  # noqa: S608
