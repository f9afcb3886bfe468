"""`trailvec serve_sql` from other processes (beeline, PyHive), its table functions, and other readers of its tables."""

from __future__ import annotations

import getpass
import hashlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote

import deltalake
import numpy as np
import pyarrow as pa
import pyspark
import pytest
from deltalake.exceptions import DeltaProtocolError
from py4j.protocol import Py4JNetworkError
from pyarrow.dataset import dataset
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import SparkSession

from jobs import serve_sql
from jobs.errors import TrailvecError, explain
from jobs.runtime import Runtime
from jobs.serve_sql import _check_address, _forget, _login, _share_functions, _watch, run_serve
from jobs.spark_session import java_home
from jobs.sql import prepare, query
from jobs.tables import (
    CURRENT,
    CURRENT_MODEL,
    EVALUATION,
    EVENTS,
    ITEM_EMBEDDINGS,
    ITEMS,
    NEIGHBOURS,
    PROBES,
    SESSIONS,
    TABLES,
    USER_EMBEDDINGS,
    USER_PROFILES,
    Table,
)
from scripts.answer_queries import queries
from scripts.document_tables import EXAMPLES, PAGE, page
from scripts.servers import free_ports
from spark_udfs import nearest_of_user, vectors
from tests.conftest import SPARK_CONF, add, make_config, put, read_delta

USER, PASSWORD = "ada", "pä-ss"  # beeline itself accepts no space or quote in a password
SECRETS = {"TRAILVEC_SQL_USER": USER, "TRAILVEC_SQL_PASSWORD": PASSWORD}
SECRETS |= {"TRAILVEC_EXPORT_KEY": "k1", "TRAILVEC_ERASE_KEY": "k2"}
SECRETS |= {f"MLFLOW_TRACKING_{name}": "m" for name in ("USERNAME", "PASSWORD", "TOKEN")}
SHORT_LIVED = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"  # options of Java
LENGTH = 8
NOON = datetime(2017, 12, 1, 12, tzinfo=timezone.utc)


@dataclass
class Served:
    """A warehouse of two models, m2 the current one; its vectors by id."""

    runtime: Runtime
    users: dict[str, np.ndarray[Any, Any]]
    items: dict[str, np.ndarray[Any, Any]]
    port: int = 0
    pid: int = 0

    def best_items(self, user: str, k: int) -> list[str]:
        scores = {item: float(self.users[user] @ vector) for item, vector in self.items.items()}
        return sorted(scores, key=lambda item: (-scores[item], item))[:k]

    def cosines(self, user: str) -> dict[str, float]:
        """With each other user, the nearest first."""
        own = self.users[user]
        scores = {
            other: float(own @ vector / np.linalg.norm(own) / np.linalg.norm(vector))
            for other, vector in self.users.items()
            if other != user
        }
        return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


@pytest.fixture(scope="module")
def warehouse(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served") / "a wärehouse, 100%"  # needs escaping in a URL
    runtime = Runtime(make_config(root, "storage.database=served"), spark)
    random = np.random.default_rng(7)

    def vectors(prefix: str, count: int) -> dict[str, np.ndarray[Any, Any]]:
        return {f"{prefix}{n}": random.integers(-9, 9, LENGTH).astype(np.float32) for n in range(count)}

    models = {model: (vectors("u", 12), vectors("i", 40)) for model in ("m1", "m2")}
    user_rows = [(u, m, NOON, 3, False, v.tolist()) for m, (users, _) in models.items() for u, v in users.items()]
    item_rows = [
        (i, n, m, NOON, False, v.tolist()) for m, (_, items) in models.items() for n, (i, v) in enumerate(items.items())
    ]
    put(runtime, USER_EMBEDDINGS, spark.createDataFrame(user_rows, USER_EMBEDDINGS.schema()))
    put(runtime, ITEM_EMBEDDINGS, spark.createDataFrame(item_rows, ITEM_EMBEDDINGS.schema()))
    found = [(m, "user_item", "u0", 1, f"i{n}", 1.0) for n, m in enumerate(models)]
    put(runtime, NEIGHBOURS, spark.createDataFrame(found, NEIGHBOURS.schema()))
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("m2",)], CURRENT_MODEL.schema()))
    return Served(runtime, *models["m2"])


@pytest.fixture(scope="module")
def server(warehouse: Served) -> Iterator[Served]:
    """The command, serving with a password; must exit with 0 when told to stop."""
    (warehouse.port,) = free_ports(1)
    # (For the few queries that it answers, Java's optimising compiler costs more than it saves.)
    given = SPARK_CONF | {"spark.driver.memory": "1g", "spark.driver.extraJavaOptions": SHORT_LIVED}
    del given["spark.ui.enabled"]  # the command's own
    conf = ", ".join(f'"{k}"={json.dumps(v)}' for k, v in given.items())
    command = [sys.executable, "-m", "jobs.cli", "serve_sql", "--port", str(warehouse.port)]
    command += ["--set", f'storage.root="{warehouse.runtime.root}"', "--set", "storage.database=served"]
    command += ["--set", "spark.master=local[2]", "--set", f"spark.conf={{{conf}}}"]
    process = subprocess.Popen(command, env=os.environ | SECRETS, stdout=subprocess.PIPE, text=True)
    warehouse.pid = process.pid
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 300)[0], "not ready after five minutes"
        expected = f"SQL at jdbc:hive2://127.0.0.1:{warehouse.port}/served (Ctrl-C stops it)\n"
        assert process.stdout.readline() == expected
        yield warehouse
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


# A client process: user, password, port and each session's queries come as JSON, the sessions' answers go back as JSON.
# The sessions run at once, each on its own connection.
CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pyhive import hive

asked = json.loads(sys.argv[1])

def session(queries):
    cursor = hive.connect("127.0.0.1", asked["port"], username=asked["user"], password=asked["password"],
                          database="served", auth="CUSTOM").cursor()
    answers = []
    for text in queries:
        cursor.execute(text)
        answers.append(None if text.startswith("CREATE") else cursor.fetchall())
    return answers

with ThreadPoolExecutor(len(asked["sessions"])) as pool:
    print(json.dumps(list(pool.map(session, asked["sessions"]))))
"""


def client(server: Served, *sessions: list[str], user: str = USER, password: str = PASSWORD) -> subprocess.Popen[str]:
    asked = json.dumps({"port": server.port, "user": user, "password": password, "sessions": sessions})
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, asked]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ten_clients_at_once(server: Served) -> None:
    sessions = [
        [
            f"CREATE TEMPORARY VIEW mine AS SELECT 'u{n}' AS user_id",  # the same name in each session
            f"SET spark.sql.shuffle.partitions={n + 1}",
            "SELECT n.item_id FROM mine, LATERAL nearest_items(mine.user_id, 3) AS n ORDER BY n.rank",
            "SELECT i.item_id FROM user_embeddings AS u JOIN item_embeddings AS i USING (model_version) "
            "JOIN mine USING (user_id) WHERE model_version = 'm2' "
            "ORDER BY vector_inner_product(u.vector, i.vector) DESC, i.item_id LIMIT 3",
            "SET spark.sql.shuffle.partitions",
        ]
        for n in range(10)
    ]
    out, err = client(server, *sessions).communicate(timeout=300)
    assert out, err
    for n, (_, _, by_function, by_query, setting) in enumerate(json.loads(out)):
        expected = [[item] for item in server.best_items(f"u{n}", 3)]
        assert by_function == expected
        assert by_query == expected
        assert setting == [["spark.sql.shuffle.partitions", str(n + 1)]]
    assert n == 9


def test_a_client_finds_the_views_of_the_current_model_and_the_functions(server: Served) -> None:
    ones = f"array({', '.join(['1F'] * LENGTH)})"
    queries = [
        "SELECT DISTINCT model_version, count(*) OVER () FROM current_user_embeddings",
        "SELECT model_version, neighbour_id FROM current_neighbours",
        "SELECT n.user_id FROM nearest_users('u0', 3) AS n ORDER BY n.rank",
        "SELECT to_json(vector_avg(vector)), to_json(vector_sum(vector)), "
        f"to_json(vector_top_k(user_id, vector, {ones}, 2)) FROM current_user_embeddings",
    ]
    out, err = client(server, queries).communicate(timeout=120)
    assert out, err
    [[of_users, of_neighbours, nearest, [aggregates]]] = json.loads(out)
    assert (of_users, of_neighbours) == ([["m2", 12]], [["m2", "i1"]])
    assert nearest == [[user] for user in list(server.cosines("u0"))[:3]]
    mean, total, best = map(json.loads, aggregates)
    vectors = np.stack(list(server.users.values()))
    assert mean == pytest.approx(vectors.mean(axis=0).tolist(), rel=1e-6)
    assert total == vectors.sum(axis=0).tolist()
    sums = {user: float(vector.sum()) for user, vector in server.users.items()}
    assert best == sorted(sums, key=lambda user: (-sums[user], user))[:2]


def test_no_client_reads_a_secret_of_the_environment(server: Served) -> None:
    queries = [f"SELECT reflect('java.lang.System', 'getenv', '{name}')" for name in ("PATH", *SECRETS)]
    out, err = client(server, queries).communicate(timeout=120)
    [[[[path]], *secrets]] = json.loads(out)
    assert path, err
    assert secrets == [[["null"]]] * len(SECRETS)  # as Spark writes Java's null


def test_no_page_shows_what_clients_ask(server: Served) -> None:
    """Spark's, which asks for no password."""
    out, err = client(server, ["SET spark.ui.enabled"]).communicate(timeout=120)
    assert json.loads(out) == [[[["spark.ui.enabled", "false"]]]], err


def test_files_are_read_as_the_server_not_as_the_name_a_client_logs_in_with(server: Served) -> None:
    """On HDFS that name would be an account. (VALUES has the optimizer call Java, on the statement's thread.)"""
    who = "SELECT reflect('org.apache.hadoop.security.UserGroupInformation', 'getCurrentUser') FROM VALUES (1)"
    out, err = client(server, [who]).communicate(timeout=120)
    assert json.loads(out)[0][0][0][0].split()[0] == getpass.getuser(), err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_program_of_a_client_reads_a_secret_of_the_servers_processes(server: Served) -> None:
    """The environments that Python, and Java, which runs the program, were started with."""
    program = "SELECT TRANSFORM('x') USING 'xargs -0 -n1 < /proc/{}/environ' AS (line STRING)"
    out, err = client(server, [program.format(process) for process in (server.pid, "$PPID")]).communicate(timeout=120)
    assert out, err
    (answers,) = json.loads(out)
    for lines in answers:
        values = {name: value for name, _, value in ((line or "").partition("=") for [line] in lines)}
        assert values["PATH"]
        assert not any(values.get(name) for name in SECRETS)


def beeline(server: Served, texts: list[str], password: str, folder: Path) -> subprocess.CompletedProcess[str]:
    secret = folder / "password"
    secret.write_text(password, encoding="utf-8")
    command = [Path(pyspark.__file__).parent / "bin" / "beeline", "-n", USER, "-w", secret, "--silent=true"]
    command += ["-u", f"jdbc:hive2://127.0.0.1:{server.port}/served", "--outputformat=csv2"]
    command += [part for text in texts for part in ("-e", text)]
    environment = os.environ | {"JAVA_HOME": java_home(), "JAVA_TOOL_OPTIONS": f"-Dfile.encoding=UTF-8 {SHORT_LIVED}"}
    environment.pop("SPARK_HOME", None)
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)


def test_beeline_and_the_columns_that_a_bi_tool_sees(server: Served, tmp_path: Path) -> None:
    """The columns through JDBC's getColumns, which queries the catalogue."""
    text = "SELECT rank, item_id, vector_norm(array(3F, 4F)) AS five FROM nearest_items('u3', 2) ORDER BY rank"
    answer = beeline(server, [text, "!columns neighbours"], PASSWORD, tmp_path)
    first, second = server.best_items("u3", 2)
    rows = "\n".join(["rank,item_id,five", f"1,{first},5.0", f"2,{second},5.0", ""])
    assert rows in answer.stdout, answer.stdout + answer.stderr
    for column in NEIGHBOURS.columns:
        assert f",neighbours,{column.name}," in answer.stdout, answer.stdout + answer.stderr
        assert f",{column.comment}," in answer.stdout.replace("\0", "")  # beeline quotes with NUL characters


def test_a_wrong_login_is_refused(server: Served) -> None:
    tries = [
        client(server, ["SELECT 1"], user=user, password=password)
        for user, password in ((USER, "wrong"), ("eve", PASSWORD), ("", ""))
    ]
    for process in tries:
        out, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert out == ""
        # The server closes the connection after its answer, which is lost if the client sees the close first.
        assert "Error validating the login" in err or "TSocket read 0 bytes" in err
    out, err = client(server, ["SELECT 1"]).communicate(timeout=120)
    assert out.strip() == "[[[[1]]]]", err


@pytest.mark.parametrize(
    ("environment", "host", "message"),
    [
        (
            {},
            "0.0.0.0",
            "0.0.0.0 can be reached from other machines: set TRAILVEC_SQL_USER and TRAILVEC_SQL_PASSWORD, ",
        ),
        ({}, "::", ":: can be reached from other machines"),
        ({"TRAILVEC_SQL_USER": "ada"}, "127.0.0.1", "TRAILVEC_SQL_PASSWORD is missing or empty: set both or neither"),
        (
            {"TRAILVEC_SQL_USER": "ada", "TRAILVEC_SQL_PASSWORD": ""},
            "0.0.0.0",
            "TRAILVEC_SQL_PASSWORD is missing or empty: set both or neither",
        ),
        ({}, "nowhere.invalid", "is not an address of this machine: correct --host or --port"),
        ({"HIVE_SERVER2_THRIFT_BIND_HOST": "0.0.0.0"}, "127.0.0.1", "would override --host and --port: unset it"),
        ({}, "127.0.0.1", "(Address already in use): choose another --host or --port"),
    ],
)
def test_what_is_not_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], host: str, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrailvecError) as caught:
            run_serve(make_config(tmp_path), host, taken.getsockname()[1])
    assert message in str(caught.value)


def test_who_may_connect_without_a_password_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _check_address("127.0.0.1", 0, with_password=True)
    assert not capsys.readouterr().err
    _check_address("127.0.0.1", 0, with_password=False)
    assert capsys.readouterr().err.startswith("no password is set: every account of this machine may read the tables")


def test_a_login_is_bytes_and_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Including bytes that are not UTF-8."""
    login = dict(zip(("TRAILVEC_SQL_USER", "TRAILVEC_SQL_PASSWORD"), (b"ada", b"p\xff"), strict=True))
    for name, value in login.items():
        monkeypatch.setenv(name, os.fsdecode(value))
    checked = _login()
    assert checked is not None
    salt, digest = (re.findall(rf'"({form})"', checked)[0] for form in ("[0-9a-f]{32}", "[0-9a-f]{64}"))
    assert hashlib.sha256(salt.encode() + b"ada\0p\xff").hexdigest() == digest
    for name in login:
        _forget(name)
        assert name not in os.environ
    _forget("TRAILVEC_SQL_USER")  # forgetting an unset variable is harmless


OWN_TABLE = "database served already has another table probes: choose another storage.database"


def spark_that(*, is_stopped: bool) -> Mock:
    """A runtime with such a Spark."""
    runtime = Mock()
    runtime.spark._jsc.sc().isStopped.return_value = is_stopped
    return runtime


def test_what_fails_for_a_while_does_not_end_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unavailable store, and a client's own table in the way."""
    stopped = threading.Event()
    away, own = AnalysisException("the store is away\nat line 1"), TrailvecError(OWN_TABLE)
    looks = [None, away, away, None, own, own, None]

    def look(runtime: Runtime) -> None:
        found = looks.pop(0)
        if not looks:
            stopped.set()
        if found is not None:
            raise found

    monkeypatch.setattr(serve_sql, "_LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(serve_sql, "register_tables", look)
    _watch(spark_that(is_stopped=False), stopped)
    said = [line.rpartition("): ")[0] for line in capsys.readouterr().err.splitlines()]  # each failure is reported once
    assert said == [f"can't register all tables ({reason}" for reason in ("the store is away", OWN_TABLE)]


@pytest.mark.parametrize(
    "error", [Py4JNetworkError("Answer from Java side is empty"), ConnectionRefusedError(111, "Connection refused")]
)
def test_a_server_without_its_java_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(serve_sql, "_LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(serve_sql, "register_tables", Mock(side_effect=error))
    with pytest.raises(TrailvecError, match=r"^the server's Java process has ended, .* start the server again$"):
        _watch(spark_that(is_stopped=False), threading.Event())


def test_a_server_whose_spark_was_stopped_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Java goes on, as where the application was killed on YARN."""
    stopped = threading.Event()

    def look(runtime: Runtime) -> None:
        stopped.set()
        raise AnalysisException("Cannot call methods on a stopped SparkContext.")

    monkeypatch.setattr(serve_sql, "_LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(serve_sql, "register_tables", look)
    with pytest.raises(TrailvecError, match=r"^Spark has ended .*: start the server again$"):
        _watch(spark_that(is_stopped=True), stopped)


def test_what_a_session_lacks_is_not_shared(spark: SparkSession) -> None:
    """With the tables on HDFS or S3 there are no table functions."""
    without = spark.newSession()
    vectors.register(without)
    _share_functions(without)
    assert spark.newSession().sql("SELECT vector_norm(array(3F, 4F))").collect()[0][0] == 5


def rows(runtime: Runtime, text: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in query(runtime, text).collect()]


def test_nearest_items_are_those_of_the_current_model(warehouse: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [
        (rank, item, float(warehouse.users["u5"] @ warehouse.items[item]))
        for rank, item in enumerate(warehouse.best_items("u5", 50), 1)
    ]
    assert rows(warehouse.runtime, "SELECT * FROM nearest_items('u5', 50)") == expected
    assert rows(warehouse.runtime, "SELECT * FROM nearest_items('u5')") == expected[:10]
    # Block by block, with no caching.
    monkeypatch.setattr(nearest_of_user, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(nearest_of_user, "_KEPT_BYTES", 0)
    folder = warehouse.runtime.root / "tables"
    users = nearest_of_user.VectorTable(folder / "user_embeddings", "user_id", "m2")
    items = nearest_of_user.VectorTable(folder / "item_embeddings", "item_id", "m2")
    for _ in range(2):
        assert list(nearest_of_user.nearest("u5", 3, users, items, "dot")) == expected[:3]


def test_nearest_users_leave_the_user_out(warehouse: Served) -> None:
    cosines = warehouse.cosines("u0")
    found = rows(warehouse.runtime, "SELECT rank, user_id, score FROM nearest_users('u0', 4)")
    assert [user for _, user, _ in found] == list(cosines)[:4]
    assert [score for *_, score in found] == pytest.approx([cosines[user] for _, user, _ in found], rel=1e-6)


def test_what_has_no_neighbours(warehouse: Served) -> None:
    assert rows(warehouse.runtime, "SELECT * FROM nearest_items('nobody', 3)") == []
    assert rows(warehouse.runtime, "SELECT * FROM nearest_users(NULL, 3)") == []
    assert rows(warehouse.runtime, "SELECT * FROM nearest_items(99999999999999999999, 3)") == []  # a DECIMAL as id
    for given, k in (("0", "0"), ("'3'", "'3'"), ("2.5", "2.5")):
        with pytest.raises(PythonException) as caught:
            rows(warehouse.runtime, f"SELECT * FROM nearest_items('u1', {given})")
        assert explain(caught.value) == f"nearest_items: k is {k}: write a whole number of at least 1"
    for given, user in (("1.0", "1.0 (Decimal)"), ("array('u1')", "['u1'] (list)")):
        with pytest.raises(PythonException) as caught:
            rows(warehouse.runtime, f"SELECT * FROM nearest_items({given}, 3)")
        sentence = f"nearest_items: user_id is {user}: write a string or a whole number, as in user_embeddings"
        assert explain(caught.value) == sentence


def test_others_read_the_same_rows(
    warehouse: Served, make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    """DuckDB and delta-rs, on a table in which a deletion vector hides a row."""
    runtime = make_runtime("storage.database=others")
    event = ("u1", "bread", "purchase", NOON, "grocery", 1.5, None, "UTC", None, None, "b1", {"store": "1"}, "log")
    put(runtime, EVENTS, spark.createDataFrame([(f"e{n}", *event) for n in range(5)], EVENTS.schema()))
    rows(runtime, "DELETE FROM events WHERE event_id = 'e3'")

    names = ("event_id", "amount", "basket_id")
    by_spark = rows(runtime, "SELECT event_id, amount, basket_id FROM events")
    by_duckdb = [tuple(row[name] for name in names) for row in read_delta(runtime.path(EVENTS))]
    builder = deltalake.QueryBuilder().register("events", deltalake.DeltaTable(runtime.path(EVENTS)))
    answer = builder.execute("SELECT * FROM events").read_all()
    by_delta_rs = list(zip(*(answer.column(name).to_pylist() for name in names), strict=True))
    assert sorted(by_spark) == [(f"e{n}", 1.5, "b1") for n in (0, 1, 2, 4)]
    assert sorted(by_duckdb) == sorted(by_delta_rs) == sorted(by_spark)

    # What docs/tables.md says they cannot read.
    with pytest.raises(DeltaProtocolError, match="deletionVectors"):
        deltalake.DeltaTable(runtime.path(EVENTS)).to_pyarrow_table()
    with pytest.raises(TypeError, match=r"field\(\)"):
        deltalake.DeltaTable(warehouse.runtime.path(NEIGHBOURS)).to_pyarrow_table()


def test_delta_rs_reads_the_current_model_as_the_docs_say(warehouse: Served) -> None:
    """By both recipes of docs/decisions/0012; and its QueryBuilder opens every table."""
    folder, runtime = warehouse.runtime.root / "tables", warehouse.runtime
    current = deltalake.DeltaTable(folder / "current_model")
    vectors = deltalake.DeltaTable(folder / "user_embeddings")
    builder = deltalake.QueryBuilder().register("u", vectors).register("c", current)
    query = "SELECT u.* FROM u WHERE model_version = (SELECT model_version FROM c)"
    by_query = builder.execute(query).read_all()

    builder = deltalake.QueryBuilder().register("c", current)
    (version,) = builder.execute("SELECT model_version FROM c").read_all().column("model_version").to_pylist()
    files = [uri for uri in map(unquote, vectors.file_uris()) if f"/model_version={version}/" in uri]
    by_files = dataset(files, format="parquet").to_table()
    for answer in (by_query, by_files):
        found = zip(*(answer.column(name).to_pylist() for name in ("user_id", "vector")), strict=True)
        assert sorted(found) == sorted((user, vector.tolist()) for user, vector in warehouse.users.items())

    counts = {"user_embeddings": 24, "item_embeddings": 80, "neighbours": 2, "current_model": 1}
    for table in TABLES:
        runtime.create(table)
        builder = deltalake.QueryBuilder().register("t", deltalake.DeltaTable(folder / table.name))
        count = builder.execute("SELECT count(*) AS n FROM t").read_all().column("n").to_pylist()
        assert (table.name, count) == (table.name, [counts.get(table.name, 0)])


def test_a_reader_sees_one_model_whole_while_models_change(
    make_runtime: Callable[..., Runtime], spark: SparkSession
) -> None:
    """A model's vectors come, then the switch to it, many times during each query."""
    runtime, users = make_runtime("storage.database=switched"), 20

    def rows_of(model: str) -> list[tuple[Any, ...]]:
        return [(f"u{n}", model, NOON, 3, False, [1.0]) for n in range(users)]

    put(runtime, USER_EMBEDDINGS, spark.createDataFrame(rows_of("m0"), USER_EMBEDDINGS.schema()))
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("m0",)], CURRENT_MODEL.schema()))
    prepare(runtime)
    names, ended = [column.name for column in USER_EMBEDDINGS.columns], threading.Event()

    def switch() -> None:
        """By delta-rs, whose commits take a hundredth of the time of Spark's."""
        for number in itertools.count(1):
            if ended.wait(0.05):
                return
            new = f"m{number}"
            columns = map(list, zip(*rows_of(new), strict=True))
            deltalake.write_deltalake(runtime.path(USER_EMBEDDINGS), pa.table([*columns], names), mode="append")
            deltalake.write_deltalake(
                runtime.path(CURRENT_MODEL), pa.table([[new]], ["model_version"]), mode="overwrite"
            )

    with ThreadPoolExecutor(1) as other:
        switching = other.submit(switch)
        try:
            query = "SELECT model_version, count(*) FROM current_user_embeddings GROUP BY model_version"
            seen = [[tuple(row) for row in spark.sql(query).collect()] for _ in range(4)]
        finally:
            ended.set()
        switching.result()  # raises what it raised
    assert [[count for _, count in answer] for answer in seen] == [[users]] * 4
    assert len({model for [(model, _)] in seen}) > 1


def test_the_page_of_tables_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python scripts/document_tables.py"


def test_the_pages_examples_can_be_run(warehouse: Served, make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("storage.database=examples", root=warehouse.runtime.root)
    for table in TABLES:
        runtime.create(table)
    prepare(runtime)
    for table in TABLES:
        runtime.spark.sql(EXAMPLES[table.name])  # Spark resolves all its tables, columns and functions


def rows_of_model(model: str, more: int) -> list[tuple[Table, list[tuple[Any, ...]]]]:
    """Rows of every table that is kept by model; `more`: other values, and larger ones where a query ranks by them."""
    users, scale = ("1", "2", "3", "4"), 10.0**more
    vectors = {user: [scale, 1.0 + n + more, float(n)] for n, user in enumerate(users)}
    items = [(f"i{n}", n + 2, model, NOON, False, [scale + n, 1.0 + n % 2 * more, 1.0]) for n in range(400)]
    evaluation = [
        (model, "test", task, "model", metric, "all", "all", value * scale, None, None, 5)
        for task, value in (("next", 0.2), ("new", 0.1))
        for metric in ("ndcg@10", "recall@20")
    ]
    return [
        (USER_EMBEDDINGS, [(user, model, NOON, 9 + more, False, vector) for user, vector in vectors.items()]),
        (USER_PROFILES, [(user, model, NOON, vector) for user, vector in vectors.items()]),
        (ITEM_EMBEDDINGS, items),
        (EVALUATION, evaluation),
        (PROBES, [(model, "inactive", "vector", "mlp", "auc", 0.01 * scale, 0.0, 9, 3)]),
        (NEIGHBOURS, [(model, "user_item", "1", 1, f"i{more}", scale), (model, "item_item", "i0", 1, "i7", scale)]),
    ]


def test_no_documented_query_mixes_models(make_runtime: Callable[..., Runtime], spark: SparkSession) -> None:
    """The rows of an older model, and of a newer one that was refused, change no answer."""
    runtime = make_runtime("storage.database=mixed")

    def fill(**models: int) -> None:
        for of_models in zip(*(rows_of_model(model, more) for model, more in models.items()), strict=True):
            table = of_models[0][0]
            found = [row for _, of_model in of_models for row in of_model]
            add(runtime, table, spark.createDataFrame(found, table.schema()))

    said = dict.fromkeys(("item_name", "category", "vertical", "unit_price"), NOON)
    items = [  # two categories, each as large as a documented query requires
        (n + 2, f"i{n}", f"item {n}", f"c{n % 2}", "grocery", 1.0, NOON, 9, 9, 500 - n, said) for n in range(400)
    ]
    put(runtime, ITEMS, spark.createDataFrame(items, ITEMS.schema()))
    event = ("e1", "2", "i0", "purchase", NOON, "grocery", 1.5, None, "UTC", None, None, None, None, "log")
    put(runtime, EVENTS, spark.createDataFrame([event], EVENTS.schema()))
    sessions = [(f"s{user}", user, NOON, NOON, 1, ["grocery"], None, [], NOON) for user in ("1", "2", "3", "4")]
    put(runtime, SESSIONS, spark.createDataFrame(sessions, SESSIONS.schema()))
    put(runtime, CURRENT_MODEL, spark.createDataFrame([("m2",)], CURRENT_MODEL.schema()))

    fill(m2=1)
    kept_by_model = [table.name for table, _ in rows_of_model("m2", 1)]
    assert sorted(table.name for table in CURRENT.values()) == sorted(kept_by_model)
    every = [*EXAMPLES.values(), *(text for _, text in queries())]
    texts = [text for text in every if any(name in text for name in (*kept_by_model, "nearest_"))]
    assert {EXAMPLES[name] for name in kept_by_model} < set(texts)
    assert set(texts) - set(EXAMPLES.values())  # some of the docs' too

    def ask_all() -> dict[str, list[tuple[Any, ...]]]:
        prepare(runtime)
        return {text: [tuple(row) for row in spark.sql(text).collect()] for text in texts}

    answers = ask_all()
    assert [text for text, answer in answers.items() if not answer] == []

    fill(m1=0, m3=2)
    assert [text for text, answer in ask_all().items() if answer != answers[text]] == []
    shown = " UNION ALL ".join(f"SELECT '{view}' AS view, model_version FROM {view}" for view in CURRENT)
    assert sorted(rows(runtime, f"SELECT DISTINCT * FROM ({shown})")) == [(view, "m2") for view in sorted(CURRENT)]
