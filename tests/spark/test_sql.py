"""`trailvec sql` and `trailvec tables`: each rule of the vector functions through real SQL, and the printed output."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deltalake
import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import Row, SparkSession
from pyspark.sql.catalog import Catalog

from jobs.errors import TrailvecError
from jobs.list_tables import list_tables, print_tables
from jobs.runtime import Runtime
from jobs.spark_session import start_spark
from jobs.sql import _cell, _print_rows, ask, query, run_sql
from jobs.sql_names import tables_to_see
from jobs.tables import CURRENT_MODEL, EVENTS, ITEM_EMBEDDINGS, ITEMS, NEIGHBOURS, TABLES, Table
from spark_udfs import vectors
from tests.conftest import make_config, put


@pytest.fixture(scope="module")
def value_of(spark: SparkSession) -> Callable[[str], Any]:
    """The value of one expression (and any clauses after it)."""
    vectors.register(spark)
    return lambda text: spark.sql(f"SELECT {text}").collect()[0][0]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("vector_inner_product(array(1F, 2F, 3F), array(4F, 5F, 6F))", 32.0),
        ("vector_cosine_similarity(array(1F, 2F, 3F), array(4F, 5F, 6F))", 32 / math.sqrt(14 * 77)),
        ("vector_l2_distance(array(1F, 2F, 3F), array(4F, 5F, 6F))", math.sqrt(27)),
        ("vector_norm(array(3F, -4F))", 5.0),
        ("vector_norm(array(3F, -4F), 1)", 7.0),
        ("vector_norm(array(3F, -4F), 2.0)", 5.0),
        ("vector_norm(array(3F, -4F), float('inf'))", 4.0),
        ("vector_normalize(array(3F, 4F))", [0.6, 0.8]),
        ("vector_normalize(array(1F, 3F), 1F)", [0.25, 0.75]),
        ("vector_avg(v) FROM VALUES (array(1F, 2F)), (array(3F, 4F)), (NULL), (array(9F, NULL)) AS t(v)", [2.0, 3.0]),
        ("vector_sum(v) FROM VALUES (array(1F, 2F)), (array(3F, 4F)), (NULL), (array(9F, NULL)) AS t(v)", [4.0, 6.0]),
        ("vector_norm(CAST(array() AS ARRAY<FLOAT>))", 0.0),
        ("vector_normalize(CAST(array() AS ARRAY<FLOAT>))", []),
    ],
)
def test_values(value_of: Callable[[str], Any], expression: str, expected: Any) -> None:
    assert value_of(expression) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "expression",
    [
        "vector_cosine_similarity(array(0F, 0F), array(4F, 5F))",  # a zero vector
        "vector_normalize(array(0F, 0F))",
        "vector_cosine_similarity(NULL, array(4F, 5F))",  # a NULL vector
        "vector_inner_product(array(4F, 5F), CAST(NULL AS ARRAY<FLOAT>))",
        "vector_l2_distance(NULL, NULL)",
        "vector_norm(CAST(NULL AS ARRAY<FLOAT>))",
        "vector_norm(array(1F), NULL)",
        "vector_normalize(NULL)",
        "vector_cosine_similarity(array(1F, NULL), array(4F, 5F))",  # a NULL element
        "vector_inner_product(array(4F, 5F), array(1F, NULL))",
        "vector_l2_distance(array(4F, NULL), array(1F, 2F))",
        "vector_norm(array(1F, NULL))",
        "vector_normalize(array(1F, NULL))",
        "vector_avg(v) FROM VALUES (CAST(NULL AS ARRAY<FLOAT>)), (array(1F, NULL)) AS t(v)",  # nothing left
        "vector_sum(v) FROM VALUES (CAST(NULL AS ARRAY<FLOAT>)) AS t(v)",
    ],
)
def test_nulls(value_of: Callable[[str], Any], expression: str) -> None:
    assert value_of(expression) is None


def test_types(spark: SparkSession) -> None:
    vectors.register(spark)
    answer = spark.sql("""
        SELECT vector_norm(v), vector_inner_product(v, v), vector_cosine_similarity(v, v), vector_l2_distance(v, v),
               vector_normalize(v)
        FROM VALUES (array(1F)) AS t(v)""")
    assert [kind for _, kind in answer.dtypes] == ["float"] * 4 + ["array<float>"]


def test_sums_are_per_group(spark: SparkSession) -> None:
    vectors.register(spark)
    answer = spark.sql("""
        SELECT k, vector_sum(v) AS total FROM VALUES ('a', array(1F)), ('b', array(5F)), ('a', array(2F)) AS t(k, v)
        GROUP BY k""")
    assert {row["k"]: row["total"] for row in answer.collect()} == {"a": [3.0], "b": [5.0]}
    assert spark.sql("SELECT vector_sum(v) FROM VALUES (array(1F)) AS t(v) WHERE false").collect() == []


def test_the_k_best_of_each_group(spark: SparkSession) -> None:
    vectors.register(spark)
    rows = """('a', 'x', array(1F, 0F)), ('a', 'w', array(2F, 0F)), ('a', 'v', array(1F, 9F)),
              ('a', 'u', array(0F, 1F)), ('a', NULL, array(9F, 9F)),
              ('a', 'n', array(9F, NULL)), ('b', 'x', array(-1F, 0F)), ('c', 'x', NULL)"""
    answer = spark.sql(f"""
        SELECT g, vector_top_k(id, v, array(1F, 0F), 3) AS best FROM VALUES {rows} AS t(g, id, v) GROUP BY g""")
    assert {row["g"]: row["best"] for row in answer.collect()} == {"a": ["w", "v", "x"], "b": ["x"], "c": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "SELECT vector_top_k('a', array(1F), array(1F), 0)",
            "vector_top_k: found k = 0: write one whole number of at least 1",
        ),
        (
            "SELECT vector_top_k('a', array(1F), array(1F), 2.5)",
            "vector_top_k: found k = 2.5: write one whole number of at least 1",
        ),
        (
            "SELECT vector_top_k('a', array(1F), array(1F), NULL)",
            "vector_top_k: found k = None: write one whole number of at least 1",
        ),
        (
            "SELECT vector_top_k(id, array(1F), array(1F), 1) FROM VALUES (7L), (NULL) AS t(id)",
            "vector_top_k takes STRING ids, found floating: write CAST(id AS STRING)",
        ),
        (
            "SELECT vector_top_k(7L, array(1F), array(1F), 1)",
            "vector_top_k takes STRING ids, found integer: write CAST(id AS STRING)",
        ),
        (
            "SELECT vector_cosine_similarity(array(1F, 2F), array(1F))",
            "vector_cosine_similarity: two vectors have the lengths 2 and 1: compare vectors of one model_version",
        ),
        (
            "SELECT vector_sum(v) FROM VALUES (array(1F)), (array(1F, 2F)) AS t(v)",
            "vector_sum: vectors of a group have the lengths 1 and 2: group by model_version too",
        ),
        (
            "SELECT vector_norm(array(1D))",
            "vector_norm takes ARRAY<FLOAT>, found float64 elements: write CAST(... AS ARRAY<FLOAT>)",
        ),
        (
            "SELECT vector_norm(array(1F), 3)",
            "the degree of a vector's norm is 3: write 1, 2 or float('inf')",
        ),
        (
            "SELECT count(*), vector_avg(v) FROM VALUES (array(1F)) AS t(v)",
            "vector_avg can't be used beside Spark's own aggregates in one SELECT: "
            "put it in its own SELECT and join the two",
        ),
        ("SELEC 1", "the SQL can't be parsed: Syntax error at or near 'SELEC'.(line 1, pos 0)"),
        (
            "SELECT * FROM evnts",
            "The table or view `evnts` cannot be found. Verify the spelling and correctness of the schema and catalog.",
        ),
        (
            "SELECT b FROM VALUES (1) AS t(a)",
            "A column or function parameter with name `b` cannot be resolved. "
            "Did you mean one of the following? [`a`].; line 1 pos 7",
        ),
        (
            "SELECT a, sum(b) FROM VALUES (1, 2) AS t(a, b)",
            "the SQL can't be run: The query does not include a GROUP BY clause. "
            "Add GROUP BY or turn it into the window functions using OVER clauses.; line 1 pos 0",
        ),
        ("SELECT raise_error('boom')", "the SQL can't be run: java.lang.RuntimeException: boom"),
        ("SELECT decode('a', 'nope')", "the SQL can't be run: java.io.UnsupportedEncodingException: nope"),
        (
            "SELECT 1 = (SELECT id FROM range(2))",
            "the SQL can't be run: More than one row returned by a subquery used as an expression.",
        ),
        ("SELECT * FROM nearest_items('a', true)", "nearest_items: k is True: write a whole number of at least 1"),
        ("SELECT * FROM nearest_items('a', '3')", "nearest_items: k is '3': write a whole number of at least 1"),
        (
            "SELECT * FROM nearest_items()",
            "the SQL can't be run: User defined table function encountered an error in the 'eval' method: "
            "nearest_items() missing 1 required positional argument: 'user_id'",
        ),
    ],
)
def test_errors_are_one_sentence(make_runtime: Callable[..., Runtime], text: str, message: str) -> None:
    with pytest.raises(TrailvecError) as caught:
        run_sql(make_runtime("storage.database=errors"), text, as_json=False)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "DELETE FROM exports",
        "INSERT INTO exports SELECT 1",
        "WITH x AS (SELECT 1) INSERT INTO exports SELECT * FROM x",
        "FROM items INSERT INTO exports SELECT *",
        "CREATE TEMPORARY VIEW v AS SELECT 1 AS user_id",
        "SET spark.sql.ansi.enabled = false",
        "VACUUM exports",
    ],
)
def test_what_only_asks_changes_nothing(make_runtime: Callable[..., Runtime], text: str) -> None:
    with pytest.raises(TrailvecError) as caught:
        ask(make_runtime("storage.database=errors"), text, "likes.toml: its sql")
    assert str(caught.value) == f"likes.toml: its sql is not a query (found {text!r}): write a SELECT"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "SELECT user_id FROM ({})",
        "WITH x AS ({}) SELECT user_id FROM x",
        "SELECT 'a' AS user_id WHERE 'a' IN ({})",
        "SELECT (SELECT max(user_id) FROM ({})) AS user_id",
    ],
)
def test_what_only_asks_starts_no_program(make_runtime: Callable[..., Runtime], text: str) -> None:
    program = "SELECT TRANSFORM (a) USING 'cat' AS (user_id STRING) FROM VALUES ('a') AS t(a)"
    with pytest.raises(TrailvecError, match=r"^likes.toml: its sql starts a program \(TRANSFORM \.\.\. USING\)"):
        ask(make_runtime("storage.database=errors"), text.format(program), "likes.toml: its sql")


def test_what_only_asks_substitutes_no_variable(make_runtime: Callable[..., Runtime]) -> None:
    """Spark's parser replaces ${env:NAME} by the environment's, and leaves no trace of it in the plan."""
    runtime, text = make_runtime("storage.database=errors"), "SELECT '${env:PATH} ${system:user.name}' AS user_id"
    assert ask(runtime, text, "a").collect()[0].user_id == "${env:PATH} ${system:user.name}"
    with pytest.raises(TrailvecError, match=r"\$\{env:PATH\}"):
        ask(runtime, "SELECT user_id FROM `${env:PATH}`", "a")


@pytest.mark.parametrize("text", ["{}", "SELECT user_id FROM ({})", "SELECT 'a' AS user_id WHERE 'a' IN ({})"])
def test_what_only_asks_reads_no_key(make_runtime: Callable[..., Runtime], text: str) -> None:
    key = "SELECT raise_error(java_method('java.lang.System', 'getenv', 'TRAILVEC_EXPORT_KEY')) AS user_id"
    with pytest.raises(TrailvecError, match=r"^likes.toml: its sql calls a Java method \(reflect"):
        ask(make_runtime("storage.database=errors"), text.format(key), "likes.toml: its sql")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT id AS user_id FROM range(9) ORDER BY rand() LIMIT 2",
        "WITH x AS (SELECT transform(array(1), a -> randn(7)) AS user_id) SELECT * FROM x",
        "SELECT 'a' AS user_id WHERE 'a' IN (SELECT uuid())",
        "SELECT explode(shuffle(array('a', 'b'))) AS user_id",
        "SELECT user_id FROM (VALUES ('a') AS t(user_id)) TABLESAMPLE (10 PERCENT)",
        "SELECT user_id FROM (VALUES ('a') AS t(user_id)) WHERE monotonically_increasing_id() % 2 = 0",
        "SELECT user_id FROM (VALUES ('a') AS t(user_id)) WHERE spark_partition_id() = 0",
        "SELECT user_id FROM (VALUES ('a') AS t(user_id)) WHERE input_file_name() = '' OR input_file_block_start() = 0",
        "SELECT any_value(user_id) AS user_id FROM (VALUES ('a') AS t(user_id))",
        "SELECT 'a' AS user_id WHERE 'a' IN (SELECT first(a) FROM (VALUES ('a', 1) AS t(a, b)) GROUP BY b)",
        "SELECT last_value(user_id) AS user_id FROM (VALUES ('a', 1) AS t(user_id, b)) GROUP BY b",
        "SELECT first(user_id) OVER (PARTITION BY b) AS user_id FROM (VALUES ('a', 1) AS t(user_id, b))",
        "SELECT first(user_id) OVER (PARTITION BY b ORDER BY b) AS user_id FROM (VALUES ('a', 1) AS t(user_id, b))",
        "SELECT lag(user_id) OVER (PARTITION BY b + 1 ORDER BY 1 + b, 'x') FROM (VALUES ('a', 1) AS t(user_id, b))",
        "SELECT * FROM (SELECT row_number() OVER (ORDER BY 1) AS n FROM (VALUES ('a') AS t(user_id))) WHERE n = 1",
        "SELECT row_number() OVER (ORDER BY (SELECT NULL)) AS n FROM (VALUES ('a') AS t(user_id))",
        "SELECT a, row_number() OVER (ORDER BY (SELECT NULL)) AS n FROM (VALUES ('a') AS t(a)) GROUP BY a",
        "SELECT row_number() OVER (ORDER BY (SELECT NULL)) FROM (VALUES ('a') AS t(a)) GROUP BY a HAVING a > ''",
        "SELECT count(*) OVER (PARTITION BY a), row_number() OVER (ORDER BY (SELECT NULL)) FROM (VALUES ('a') AS t(a))",
        "SELECT row_number() OVER (ORDER BY c) AS n FROM (SELECT a, 1 AS c FROM (VALUES ('a') AS t(a)))",
        "SELECT count(*) OVER (ORDER BY 1 ROWS UNBOUNDED PRECEDING) AS n FROM (VALUES ('a') AS t(user_id))",
        "SELECT sum(1) OVER (ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) AS n FROM (VALUES ('a') AS t(user_id))",
    ],
)
def test_what_only_asks_draws_nobody_by_chance(make_runtime: Callable[..., Runtime], text: str) -> None:
    told = r"^a: its sql is not repeatable \(\w+.* may differ each time\): order by xxhash64\(user_id\), use "
    with pytest.raises(TrailvecError, match=told):
        ask(make_runtime("storage.database=errors"), text, "a: its sql")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT user_id FROM (VALUES ('a'), ('b') AS t(user_id)) LIMIT 1",
        "SELECT user_id FROM (VALUES ('a'), ('b') AS t(user_id)) TABLESAMPLE (1 ROWS)",
        "SELECT a FROM (SELECT a FROM (VALUES ('a'), ('b') AS t(a)) LIMIT 1) ORDER BY a LIMIT 1",
        "SELECT a FROM (VALUES ('a'), ('b') AS t(a)) SORT BY a LIMIT 1",
        "SELECT a FROM (VALUES ('a'), ('b') AS t(a)) CLUSTER BY a LIMIT 1",
        "SELECT a FROM (VALUES ('a'), ('b') AS t(a)) OFFSET 1",
        "SELECT a FROM (VALUES ('a'), ('b') AS t(a)) GROUP BY a LIMIT 1",
        """SELECT a FROM (VALUES ('a'), ('b') AS t(a)) ORDER BY "a" LIMIT 1""",
        "SELECT a FROM (VALUES ('a'), ('b') AS t(a)) ORDER BY (SELECT NULL) LIMIT 1",
        "SELECT a, 1 AS one FROM (VALUES ('a'), ('b') AS t(a)) ORDER BY one LIMIT 1",
    ],
)
def test_what_only_asks_takes_no_rows_that_others_could_stand_for(
    make_runtime: Callable[..., Runtime], text: str
) -> None:
    with pytest.raises(
        TrailvecError, match=r"^a: its sql takes arbitrary rows \(a LIMIT or OFFSET without ORDER BY, or "
    ):
        ask(make_runtime("storage.database=errors"), text, "a: its sql")


def test_what_fails_while_it_runs_is_told_once(
    spark: SparkSession, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    start_spark(make_config(tmp_path))  # pytest discards earlier warning filters
    with pytest.raises(Exception, match="boom"):
        spark.sql("SELECT raise_error('boom') AS a").toPandas()
    assert not [said for said in recwarn if "Arrow" in str(said.message)]


def test_what_asks_is_asked(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("storage.database=errors")
    by_order = "SELECT a FROM (VALUES (2, 1), (1, 2) AS t(a, b)) ORDER BY b DESC LIMIT 1"
    of_one_row = "SELECT 1 AS a WHERE 3 = (SELECT max(b) FROM (VALUES (2), (3) AS t(b)) LIMIT 1)"
    in_order = "SELECT first(a) OVER (PARTITION BY b ORDER BY b, a) FROM (VALUES (1, 2) AS t(a, b)) ORDER BY a OFFSET 0"
    how_many = "SELECT count(*) OVER (PARTITION BY a) FROM (VALUES (1) AS t(a))"
    groups = (
        "SELECT row_number() OVER (ORDER BY count(*), a) AS n FROM (VALUES (1) AS t(a)) GROUP BY a ORDER BY n LIMIT 1"
    )
    commonest = "SELECT a FROM (VALUES (1), (1), (2) AS t(a)) GROUP BY a ORDER BY count(*) DESC LIMIT 1"
    so_far = "SELECT count(*) OVER (ORDER BY a + 1 ROWS UNBOUNDED PRECEDING) FROM (VALUES (1) AS t(a))"
    texts = ("-- all\nSELECT 1 AS a;", "WITH x AS (SELECT 1 AS a) SELECT * FROM x", "(VALUES (1)) UNION SELECT 1")
    of_three = "SELECT * FROM (VALUES (0), (1), (2) AS t(a)) ORDER BY a LIMIT 1 OFFSET 1"
    for text in (*texts, by_order, of_three, of_one_row, in_order, how_many, so_far, groups, commonest):
        assert [row[0] for row in ask(runtime, text, "a").collect()] == [1]
    with pytest.raises(TrailvecError, match=r"^a: the SQL can't be parsed: Syntax error at or near 'SELEC'"):
        ask(runtime, "SELEC 1", "a")
    with pytest.raises(TrailvecError, match=r"^a: The table or view `evnts` cannot be found"):
        ask(runtime, "SELECT * FROM evnts", "a")


@pytest.fixture(scope="module")
def filled(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with three items' vectors; each test takes a copy."""
    runtime = Runtime(make_config(tmp_path_factory.mktemp("filled")), spark)
    rows = [
        (item, n, "m1", datetime(2017, 12, 1, tzinfo=timezone.utc), False, vector)
        for n, (item, vector) in enumerate([("bread", [1.0, 0.0]), ("butter", [1.0, 1.0]), ("nails", [-1.0, 2.0])], 2)
    ]
    put(runtime, ITEM_EMBEDDINGS, spark.createDataFrame(rows, ITEM_EMBEDDINGS.schema()))
    return runtime.root


@pytest.fixture
def shop(filled: Path, make_runtime: Callable[..., Runtime], spark: SparkSession) -> Runtime:
    """Three items' vectors in this test's own database."""
    runtime = make_runtime("storage.database=shop")
    spark.sql("DROP DATABASE IF EXISTS shop CASCADE")  # the session is shared: drop the last test's tables
    shutil.copytree(filled, runtime.root)
    return runtime


NEAREST = """
    SELECT b.item_id, vector_cosine_similarity(a.vector, b.vector) AS likeness
    FROM item_embeddings a JOIN item_embeddings b USING (model_version)
    WHERE a.item_id = 'bread' AND b.item_id <> 'bread' ORDER BY likeness DESC"""


def test_a_query_joins_tables_by_name(shop: Runtime) -> None:
    assert [row["item_id"] for row in query(shop, NEAREST).collect()] == ["butter", "nails"]
    comments = {row["col_name"]: row["comment"] for row in query(shop, "DESCRIBE item_embeddings").collect()}
    assert comments["vector"] == "The vector."


def test_a_table_of_yours_stays(make_runtime: Callable[..., Runtime], spark: SparkSession, tmp_path: Path) -> None:
    spark.sql(f"CREATE DATABASE theirs LOCATION '{tmp_path}/tables'")  # where one of ours might be
    spark.sql("CREATE TABLE theirs.current_model USING parquet AS SELECT 1 AS a")
    spark.sql(f"CREATE TABLE theirs.items USING parquet LOCATION '{tmp_path}/lake/tables/items' AS SELECT 1 AS a")
    runtime = make_runtime("storage.database=theirs")
    runtime.create(NEIGHBOURS)
    query(runtime, "SELECT 1")  # registers NEIGHBOURS; of these names there are none of ours yet
    for table in (ITEMS, CURRENT_MODEL):
        assert spark.table(f"theirs.{table.name}").count() == 1
        runtime.create(table)
        with pytest.raises(
            TrailvecError, match=f"^database theirs already has another table {table.name}: choose another"
        ):
            query(runtime, "SELECT 1")
        assert spark.table(f"theirs.{table.name}").count() == 1
        shutil.rmtree(runtime.path(table))


def test_a_view_of_the_current_model_comes_with_its_table(shop: Runtime, spark: SparkSession) -> None:
    for view in ("current_item_embeddings", "current_neighbours"):
        with pytest.raises(TrailvecError, match=f"`{view}` cannot be found"):
            query(shop, f"SELECT * FROM {view}")
    put(shop, CURRENT_MODEL, spark.createDataFrame([("m1",)], CURRENT_MODEL.schema()))
    assert query(shop, "SELECT * FROM current_item_embeddings").count() == 3
    with pytest.raises(TrailvecError, match="`current_neighbours` cannot be found"):
        query(shop, "SELECT * FROM current_neighbours")
    shop.create(NEIGHBOURS)
    assert query(shop, "SELECT * FROM current_neighbours").count() == 0


@pytest.mark.parametrize("look", [False, None])
def test_what_another_made_since_the_look_or_one_may_not_see_stays(
    shop: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, look: bool | None
) -> None:
    put(shop, CURRENT_MODEL, spark.createDataFrame([("m1",)], CURRENT_MODEL.schema()))
    query(shop, "SELECT 1")
    seen = tables_to_see(shop) | {ITEM_EMBEDDINGS.name: look}
    monkeypatch.setattr("jobs.sql_names.tables_to_see", lambda _: seen)
    assert query(shop, "SELECT * FROM item_embeddings JOIN current_item_embeddings USING (item_id)").count() == 3


def test_what_somebody_dropped_or_replaced_is_known_anew(
    shop: Runtime, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shop, CURRENT_MODEL, spark.createDataFrame([("m1",)], CURRENT_MODEL.schema()))
    assert query(shop, "SELECT * FROM current_item_embeddings").count() == 3
    made: list[str] = []
    create = Catalog.createTable

    def noted(catalog: Catalog, name: str, **options: Any) -> Any:
        made.append(name)
        return create(catalog, name, **options)

    monkeypatch.setattr(Catalog, "createTable", noted)
    for done, anew in (
        ("DROP TABLE item_embeddings", ["item_embeddings"]),
        ("DROP VIEW current_item_embeddings", []),
        ("CREATE OR REPLACE VIEW current_item_embeddings AS SELECT 5 AS five", []),
        ("DROP DATABASE shop CASCADE", ["current_model", "item_embeddings"]),
    ):
        spark.sql(done)
        made.clear()
        assert query(shop, "SELECT vector FROM current_item_embeddings").count() == 3
        assert made == anew, done
    spark.sql("DROP TABLE item_embeddings")
    spark.sql("CREATE TABLE item_embeddings USING delta AS SELECT 5 AS five")
    with pytest.raises(TrailvecError, match="database shop already has another table item_embeddings"):
        query(shop, "SELECT * FROM item_embeddings")


def test_a_table_that_one_may_not_look_into_is_not_there() -> None:
    """On HDFS, S3 and Azure; but seeing no table at all is not a valid answer."""
    denied = AnalysisException("org.apache.hadoop.security.AccessControlException: Permission denied: user=ana")
    forbidden = AnalysisException("java.nio.file.AccessDeniedException: s3a://lake/tables/exports: getFileStatus")
    azure = AnalysisException('java.nio.file.AccessDeniedException: Operation failed: "not authorized", 403, HEAD, …')
    refused = {"exports": denied, "erasures": azure, "erased_users": forbidden}
    answers: dict[str, bool | AnalysisException] = {"events": True, **refused}

    def exists(table: Table) -> bool:
        answer = answers.get(table.name, False)
        if isinstance(answer, AnalysisException):
            raise answer
        return answer

    runtime = Mock(exists=exists)
    seen = tables_to_see(runtime)
    assert [name for name, there in seen.items() if there is not False] == ["events", *refused]
    assert [seen[name] for name in refused] == [None, None, None]
    answers["items"] = AnalysisException("the store is away")
    with pytest.raises(AnalysisException, match="the store is away"):
        tables_to_see(runtime)
    answers.update(events=False, items=False)
    with pytest.raises(AnalysisException, match=r"Permission denied|AccessDenied"):
        tables_to_see(runtime)


def test_the_printed_table(shop: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(shop, NEAREST, as_json=False)
    printed = capsys.readouterr().out
    assert "butter" in printed
    assert "0.707107" in printed
    assert printed.endswith("2 rows\n")

    run_sql(shop, "SELECT id FROM range(7)", as_json=False, limit=5)
    printed = capsys.readouterr().out
    assert "4" in printed
    assert "5 │" not in printed
    assert "the first 5 rows; there are more rows" in printed

    run_sql(shop, "SELECT array(1F, 2F, 3F, 4F) AS v, NULL AS n, '[red]x[/red]' AS t", as_json=False)
    printed = capsys.readouterr().out
    assert "[1, 2, 3, … 4 in all]" in printed
    assert "NULL" in printed
    assert "[red]x[/red]" in printed


def test_a_table_too_wide_for_the_terminal_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither columns nor characters that take two columns of the terminal."""
    names = [f"name{n}" for n in range(100, 145)]
    values = [f"牛乳x{n}" for n in range(100, 145)]
    _print_rows(names, [Row(*values)], 10)
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = ["".join(parts) for parts in zip(*filter(None, cells), strict=True)]
    assert shown == [name + value for name, value in zip(names, values, strict=True)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (8286663.32, "8286663.32"),
        (1234.5678, "1234.57"),
        (0.1 + 0.2, "0.3"),
        (-1e4, "-10000.00"),
        (1e30, "1e+30"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (True, "true"),
        (bytearray(b"\0\xff"), "X'00FF'"),
        ({"a": Decimal("1.5"), "b": None}, "{a: 1.5, b: NULL}"),
        (Row(x=1.23456789, inner=Row(d="2011-01-01")), "{x: 1.23457, inner: {d: 2011-01-01}}"),
        ("milk\x1b[2J\x1b]0;mine\x07\r\x9b1m\x7f\n\tÜ", "milk\\x1b[2J\\x1b]0;mine\\x07\\x0d\\x9b1m\\x7f\n\tÜ"),
        ({"\x1b": ["\x00"]}, "{\\x1b: [\\x00]}"),
        ([{"a": [1, 2, 3, 4]}], "[{a: [1, 2, 3, … 4 in all]}]"),
    ],
)
def test_a_printed_value(value: Any, shown: str) -> None:
    assert _cell(value) == shown


def test_printed_times_are_utc_on_any_machine(
    shop: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        times = "VALUES (TIMESTAMP '2017-12-01 08:00:00.000001') AS v(t)"
        run_sql(shop, f"SELECT t, t, array(t) AS a, map(t, struct(t)) AS m FROM {times}", as_json=False)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert capsys.readouterr().out.count("2017-12-01 08:00:00.000001") == 5
    run_sql(shop, "SELECT DATE '+10000-01-01' AS day", as_json=False)  # beyond Python's years
    assert "+10000-01-01" in capsys.readouterr().out
    run_sql(shop, "SELECT INTERVAL '-1' MINUTE AS i, array(INTERVAL '1-2' YEAR TO MONTH) AS a", as_json=False)
    printed = capsys.readouterr().out
    assert "INTERVAL '-01' MINUTE" in printed
    assert "[INTERVAL '1-2' YEAR TO MONTH]" in printed


def test_json_lines(shop: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    columns = "item_id, vector, NULL AS nothing, as_of + INTERVAL 1 MICROSECOND AS t"
    run_sql(shop, f"SELECT {columns} FROM item_embeddings ORDER BY item_id", as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["item_id"] for line in lines] == ["bread", "butter", "nails"]
    assert lines[1] == {"item_id": "butter", "vector": [1.0, 1.0], "nothing": None, "t": "2017-12-01T00:00:00.000001Z"}
    run_sql(shop, "SELECT decode(X'C29B7F', 'UTF-8') AS a", as_json=True)  # what clears a terminal's screen, and delete
    printed = capsys.readouterr().out
    assert printed == '{"a":"\\u009b\\u007f"}\n'
    assert json.loads(printed) == {"a": "\x9b\x7f"}
    with pytest.raises(TrailvecError, match="two columns of the result are named a: give one another name with AS"):
        run_sql(shop, "SELECT 1 AS a, 2 AS b, 3 AS a", as_json=True)


def test_tables_against_delta_rs(shop: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {entry["table"]: entry for entry in list_tables(shop)}
    assert list(entries) == [table.name for table in TABLES]
    assert entries["events"] == {
        "table": "events",
        "stage": "ingest",
        "location": shop.path(TABLES[0]),
        "exists": False,
    }

    items = entries["item_embeddings"]
    other = deltalake.DeltaTable(items["location"])
    files = [Path(items["location"]) / name for name in other.file_uris()]
    assert (items["rows"], items["version"]) == (3, other.version())
    assert (items["files"], items["bytes"]) == (len(files), sum(file.stat().st_size for file in files))
    # A version's time is the mtime of its commit file (Delta's rule); the one inside was taken before the write.
    commit = Path(items["location"]) / "_delta_log" / f"{other.version():020}.json"
    written = datetime.fromtimestamp(commit.stat().st_mtime, timezone.utc)
    assert items["written_at"] == written.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert items["last_writer"]["stage"] == "put"

    print_tables(shop, as_json=True)
    assert json.loads(capsys.readouterr().out) == list(entries.values())
    print_tables(shop, as_json=False)
    printed = capsys.readouterr().out
    assert "item_embeddings" in printed
    assert "run `trailvec ingest`" in printed


def test_tables_that_one_may_not_look_into_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {table.name: None if table == EVENTS else False for table in TABLES}
    monkeypatch.setattr("jobs.list_tables.tables_to_see", lambda _: seen)
    runtime = Mock(path=lambda table: table.name, place=Path("lake"))
    assert {entry["table"]: entry["exists"] for entry in list_tables(runtime)} == seen
    print_tables(runtime, as_json=False)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if "no access" in line] == ["events"]
