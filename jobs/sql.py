"""`trailvec sql`: one query over the tables, with the functions of spark_udfs/vectors.py and nearest_of_user.py.

trailvec sql --conf conf/local.toml "SELECT vertical, count(*) AS events FROM events GROUP BY vertical"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from py4j.java_gateway import is_instance_of
from py4j.protocol import Py4JJavaError
from pyspark.errors import ParseException, PySparkException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F
from pyspark.sql import types as T
from rich.table import Table as Grid

from jobs.cli import printable, table_console
from jobs.errors import TrailvecError, explain, first_line
from jobs.runtime import Runtime
from jobs.spark_session import JSON_MICROSECONDS, spark_conf
from jobs.sql_names import register_tables
from jobs.tables import CURRENT_MODEL, ITEM_EMBEDDINGS, TABLES, USER_EMBEDDINGS
from spark_udfs import nearest_of_user, vectors

_FAILURES = (PySparkException, Py4JJavaError)  # the second: run-time failures for which PySpark has no class
_SHOWN_ELEMENTS = 3  # per array
_TIMES = (T.DateType, T.TimestampType, T.TimestampNTZType, T.DayTimeIntervalType, T.YearMonthIntervalType)
# Characters that can move a terminal's cursor and that Spark's JSON leaves as they are; read back, they are equal.
_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(127, 160)}
# Spark's names of plan nodes and expressions that are random or depend on a table's physical files.
_BY_CHANCE = {
    *("Rand", "Randn", "Uuid", "Shuffle", "Sample"),
    *("monotonically_increasing_id", "SparkPartitionID"),
    *("InputFileName", "InputFileBlockStart", "InputFileBlockLength"),
}
# These depend on the order of a window's rows, the first three also on that of a group's.
_BY_ORDER = {"First", "Last", "AnyValue", "NthValue", "Lag", "Lead", "RowNumber", "NTile"}
_ALL_ROWS = "ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING"  # of a window's partition


def prepare(runtime: Runtime) -> None:
    """Registers the tables and functions in the runtime's Spark session, for use by spark.sql()."""
    register_tables(runtime)
    vectors.register(runtime.spark)
    if isinstance(runtime.place, Path):  # the table functions read local files
        nearest_of_user.register(runtime.spark, runtime.place, runtime.config.model.version)


def query(runtime: Runtime, text: str) -> DataFrame:
    """The result of a query over the tables, by their names.

    Raises:
        TrailvecError: Spark refuses the query; the message is the first sentence of Spark's own.
    """
    prepare(runtime)
    try:
        return runtime.spark.sql(text)
    except _FAILURES as error:
        raise _one_sentence(error) from error


def ask(runtime: Runtime, text: str, where: str) -> DataFrame:
    """As `query`, for SQL from a file, which must be a read-only and repeatable query.

    Refuses statements that write, drop or set; queries that start programs (TRANSFORM) or call Java, since these can
    read the keys in the environment (${env:NAME}, Spark's other way to it, is text like any other); and queries that
    are random or take arbitrary rows (LIMIT or OFFSET without ORDER BY, first() of a group or of a window that orders
    nothing), since their result changes between runs or when files are compacted.

    Args:
        where: what error messages call the query.

    Raises:
        TrailvecError: it is not such a query, or Spark refuses it.
    """
    parser = runtime.spark._jsparkSession.sessionState().sqlParser()
    with spark_conf(runtime.spark, {"spark.sql.variable.substitute": "false"}):
        try:
            parser.parsePlan(text)
        except PySparkException as error:
            raise TrailvecError(f"{where}: {_one_sentence(error)}") from error
        try:
            parser.parseQuery(text)  # Spark's grammar for queries only, as used for views
        except ParseException:
            found = " ".join(text.split())[:60]
            raise TrailvecError(f"{where} is not a query (found {found!r}): write a SELECT") from None
        try:
            answer = query(runtime, text)
        except TrailvecError as error:
            raise TrailvecError(f"{where}: {error}") from error
    for plan in _nodes(answer._jdf.queryExecution().analyzed()):
        if plan.nodeName() == "ScriptTransformation":
            raise TrailvecError(f"{where} starts a program (TRANSFORM ... USING): remove this clause")
        parts = list(_expressions(plan.expressions()))
        names = {plan.nodeName(), *(part.nodeName() for part in parts)}
        if "CallMethodViaReflection" in names:
            raise TrailvecError(f"{where} calls a Java method (reflect or java_method): remove this call")
        if plan.nodeName() in ("LocalLimit", "Offset") and not _is_ordered(plan.child()):
            raise TrailvecError(
                f"{where} takes arbitrary rows (a LIMIT or OFFSET without ORDER BY, or with one of a constant, or "
                f"TABLESAMPLE), which change when the table's files are compacted: order by the column user_id, for "
                f"example (in double quotes it is a text)"
            )
        unordered = plan.nodeName() == "Aggregate" or (
            plan.nodeName() == "Window" and not _orders(plan.orderSpec(), plan.child(), plan.partitionSpec())
        )
        drawn = names & (_BY_CHANCE | _BY_ORDER if unordered else _BY_CHANCE)
        if unordered:
            frames = {part.sql() for part in parts if part.nodeName() == "SpecifiedWindowFrame"} - {_ALL_ROWS}
            drawn |= {frame for frame in frames if frame.startswith("ROWS")}
        if drawn:
            raise TrailvecError(
                f"{where} is not repeatable ({', '.join(sorted(drawn))} may differ each time): order by "
                f"xxhash64(user_id), use min(x) or max_by(x, y) instead of first(x), last(x) and any_value(x), or give "
                f"the window an ORDER BY of a column that differs within its partitions"
            )
    return answer


def _orders(by: Any, below: Any, partition: Any) -> bool:
    """Whether an ORDER BY orders the rows of the plan below it: by anything but constants and the expressions
    `partition`, which a window's partition shares."""
    same = [*_each(partition), *_constants(below)]
    keys = [key.child() for key in _each(by)]
    return any(not _is_constant(key) and not any(key.semanticEquals(one) for one in same) for key in keys)


def _constants(plan: Any) -> Iterator[Any]:
    """The columns of a plan that hold one value: (SELECT NULL) in an ORDER BY becomes one too."""
    while plan.nodeName() in ("Project", "Aggregate", "Window", "Filter", "SubqueryAlias"):
        if plan.nodeName() in ("Project", "Aggregate"):
            for one in _each(plan.projectList() if plan.nodeName() == "Project" else plan.aggregateExpressions()):
                counts = any(part.nodeName() == "AggregateExpression" for part in _expressions(one.children()))
                if one.nodeName() == "Alias" and _is_constant(one) and not counts:  # count(*) names no column either
                    yield one.toAttribute()
        plan = plan.child()


def _is_constant(value: Any) -> bool:
    return bool(value.deterministic() and value.references().isEmpty())


def _is_ordered(plan: Any) -> bool:
    """Whether a LIMIT or OFFSET over this Spark plan takes the first rows of an ORDER BY, or the only row."""
    while plan.nodeName() in ("Project", "Offset"):
        plan = plan.child()
    if plan.nodeName() == "Sort":  # not global: SORT BY and CLUSTER BY, each task's rows alone
        return getattr(plan, "global")() and _orders(plan.order(), plan.child(), plan.order().take(0))
    return bool(plan.nodeName() == "Aggregate" and plan.groupingExpressions().isEmpty())


# Tables that nearest_items and nearest_users may read, which a plan doesn't show.
UNSEEN = frozenset(table.name for table in (CURRENT_MODEL, USER_EMBEDDINGS, ITEM_EMBEDDINGS))
# Plan leaves that read no source themselves.
_WITHOUT_SOURCE = {"OneRowRelation", "LocalRelation", "Range", "CTERelationRef"}
_OF_FILES = "org.apache.spark.sql.execution.datasources.HadoopFsRelation"
_LISTED = "org.apache.spark.sql.execution.datasources.InMemoryFileIndex"  # used for plain files; Delta has its own
# Spark's parser resolves DATE 'today' to a day, so the plan doesn't show it. Plain strings that match do no harm.
_SPECIAL_TIMES = re.compile(r"""['"]\s*(now|today|tomorrow|yesterday)(\s+[\w/:+-]+)?\s*['"]""", re.IGNORECASE)


def names_the_time(text: str, answer: DataFrame) -> bool:
    """Whether a query uses the current date or time, so that tomorrow it may return another result from the same rows.

    Args:
        answer: the result of `ask` for the text.
    """
    if _SPECIAL_TIMES.search(text):
        return True
    patterns = answer.sparkSession._jvm.org.apache.spark.sql.catalyst.trees.TreePattern  # type: ignore[union-attr]
    return bool(answer._jdf.queryExecution().analyzed().containsPattern(patterns.CURRENT_LIKE()))


class Sources(NamedTuple):
    """What a query reads, by whichever names.

    Attributes:
        tables: the names of trailvec's tables that it reads.
        files: the first path of plain files that it reads by path; None if there are none.
        others: whether it reads any other table.
    """

    tables: set[str]
    files: str | None
    others: bool


def sources_of(runtime: Runtime, answer: DataFrame) -> Sources:
    """The sources of a query; `answer`: the result of `ask`."""
    gateway: Any = runtime.spark.sparkContext._gateway
    path_of = gateway.jvm.org.apache.hadoop.fs.Path
    known = {path_of(runtime.path(table)).toUri().getPath(): table.name for table in TABLES}
    tables: set[str] = set()
    files, others = None, False
    for node in _nodes(answer._jdf.queryExecution().analyzed()):
        if node.children().size() or node.nodeName() in _WITHOUT_SOURCE:
            continue
        roots: list[str] = []
        if node.nodeName() == "LogicalRelation" and is_instance_of(gateway, node.relation(), _OF_FILES):
            roots = [path.toUri().getPath() for path in _each(node.relation().location().rootPaths())]
        if roots and known.keys() >= set(roots):
            tables.update(known[root] for root in roots)
        elif roots and node.catalogTable().isEmpty() and is_instance_of(gateway, node.relation().location(), _LISTED):
            files = files or roots[0]
        else:
            others = True
    return Sources(tables, files, others)


def _nodes(plan: Any) -> Iterator[Any]:
    """A plan's nodes (Java objects), including those of its subqueries."""
    yield plan
    for parts in (plan.children(), plan.subqueries()):
        for part in _each(parts):
            yield from _nodes(part)


def _expressions(some: Any) -> Iterator[Any]:
    """The expressions (a Scala Seq) and, recursively, their children."""
    for one in _each(some):
        yield one
        yield from _expressions(one.children())


def _each(some: Any) -> Iterator[Any]:
    """The elements of a Scala Seq."""
    return (some.apply(number) for number in range(some.size()))


def run_sql(runtime: Runtime, text: str, as_json: bool, limit: int = 100) -> None:
    """Prints the result: a table of the first `limit` rows, or all rows as JSON lines.

    Raises:
        TrailvecError: Spark refuses the query, or it fails at run time; or JSON is asked for and two columns share a
            name, of which readers of JSON would keep the last.
    """
    answer = query(runtime, text)
    if as_json and (twice := [name for name, count in Counter(answer.columns).items() if count > 1]):
        raise TrailvecError(f"two columns of the result are named {twice[0]}: give one another name with AS")
    try:
        if as_json:
            line = F.to_json(F.struct("*"), JSON_MICROSECONDS | {"ignoreNullFields": "false"})
            for row in answer.select(line).toLocalIterator():
                print(row[0].translate(_JSON_CONTROLS))
        elif answer.columns:
            _print_rows(answer.columns, _times_as_text(answer.limit(limit + 1)).collect(), limit)
    except _FAILURES as error:
        raise _one_sentence(error) from error


def _times_as_text(answer: DataFrame) -> DataFrame:
    """The rows with dates, times and intervals (nested ones too) as text formatted by Spark in the session's zone, UTC:
    Python would use the machine's zone, can't represent years after 9999, and shows minus one minute as a day less
    24 hours but a minute. Columns are numbered, since names may repeat."""
    numbered = answer.toDF(*map(str, range(len(answer.columns))))
    return numbered.select([F.col(field.name).cast(_text_of_times(field.dataType)) for field in numbered.schema])


def _text_of_times(kind: T.DataType) -> T.DataType:
    if isinstance(kind, _TIMES):
        return T.StringType()
    if isinstance(kind, T.ArrayType):
        return T.ArrayType(_text_of_times(kind.elementType), kind.containsNull)
    if isinstance(kind, T.MapType):
        return T.MapType(_text_of_times(kind.keyType), _text_of_times(kind.valueType), kind.valueContainsNull)
    if isinstance(kind, T.StructType):
        return T.StructType([T.StructField(f.name, _text_of_times(f.dataType), f.nullable) for f in kind])
    return kind


def _print_rows(columns: list[str], rows: list[Row], limit: int) -> None:
    grid = Grid()
    for column in columns:
        grid.add_column(column, overflow="fold", min_width=2)
    for row in rows[:limit]:
        grid.add_row(*[_cell(value) for value in row])
    console = table_console()
    # Rich leaves columns out for which it has no room, and of a column of width 1 the characters of width 2: too wide a
    # table is for the terminal to wrap.
    console.width = max(console.width, 1 + 5 * len(columns))
    console.print(grid)
    more = f"the first {limit:,} rows; there are more rows: add a WHERE, or --json for all"
    console.print(more if len(rows) > limit else f"{len(rows):,} row{'s' * (len(rows) != 1)}")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "NULL" if value is None else str(value).lower()
    if isinstance(value, float):  # large values get two decimals, as for money, while a double can hold them
        return f"{value:.2f}" if 1e4 <= abs(value) < 1e13 else f"{value:.6g}"
    if isinstance(value, bytes | bytearray):
        return f"X'{value.hex().upper()}'"
    if isinstance(value, dict | Row):
        pairs = value.items() if isinstance(value, dict) else zip(value.__fields__, value, strict=True)
        return f"{{{', '.join(f'{_cell(key)}: {_cell(inner)}' for key, inner in pairs)}}}"
    if isinstance(value, list):
        shown = ", ".join(_cell(element) for element in value[:_SHOWN_ELEMENTS])
        return f"[{shown}, … {len(value):,} in all]" if len(value) > _SHOWN_ELEMENTS else f"[{shown}]"
    return printable(str(value))


def _one_sentence(error: PySparkException | Py4JJavaError) -> TrailvecError:
    known = explain(error)
    if known is None:
        first = re.search(r"\[[A-Z][A-Z0-9_.]*\] ([^\n]+)", str(error))
        known = f"the SQL can't be run: {first[1] if first else first_line(error)}"
    return TrailvecError(known.rstrip(";"))
