"""How Spark is started, without starting it: what its builder and its Java are given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import spark_session
from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.spark_session import start_spark

_GIVEN = {"PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION"}  # by whoever starts Python


class Builder:
    """Of a session whose Java takes files' names as ASCII, so that start_spark ends there."""

    def __init__(self) -> None:
        self.settings = dict[str, str]()

    def appName(self, _: str) -> Builder:
        return self

    def master(self, master: str) -> Builder:
        return self.config("spark.master", master)

    def config(self, key: str, value: str) -> Builder:
        self.settings[key] = value
        return self

    def getOrCreate(self) -> Any:
        system = SimpleNamespace(getProperty={"sun.jnu.encoding": "ANSI_X3.4-1968"}.get)
        return SimpleNamespace(_jvm=SimpleNamespace(java=SimpleNamespace(lang=SimpleNamespace(System=system))))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    """A process of its own, in which no Spark runs."""
    environment = {name: value for name, value in os.environ.items() if name not in _GIVEN}
    monkeypatch.setattr(os, "environ", environment)
    made = Builder()
    monkeypatch.setattr(spark_session, "SparkSession", SimpleNamespace(builder=made))
    return made


def started(*sets: str) -> None:
    with pytest.raises(TrailvecError) as told:
        start_spark(load_config(None, list(sets)))
    assert str(told.value) == (
        "Java takes the names of files as ANSI_X3.4-1968 and Python as utf-8, so files with other characters would be "
        "left out: set LC_ALL to a UTF-8 locale that `locale -a` lists, such as C.UTF-8 (on YARN: "
        "spark.yarn.appMasterEnv.LC_ALL and spark.executorEnv.LC_ALL in [spark.conf])"
    )


@pytest.mark.parametrize(("encoding", "found"), [("ANSI_X3.4-1968", "C.UTF-8"), ("UTF-8", "de_DE.UTF-8")])
def test_a_java_of_another_encoding_than_utf_8_is_refused_and_none_is_started(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, encoding: str, found: str
) -> None:
    os.environ["LC_ALL"] = "de_DE.UTF-8"  # not installed, in the first case
    monkeypatch.setattr("locale.getencoding", lambda: encoding)
    started()
    assert os.environ["LC_ALL"] == found


@pytest.mark.parametrize(
    ("own", "given", "runs_on"),
    [
        ("local[*]", "yarn", "yarn"),
        ("local[2]", "local[3]", "local[3]"),
        ("yarn", "local[*]", "yarn"),  # given none
        ("yarn", "yarn", "yarn"),  # scripts/submit_yarn.sh
        ("", "yarn", None),  # left to it
        ("local[2]", None, "local[2]"),  # without spark-submit
    ],
)
def test_the_master_that_spark_submit_was_given_wins(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, own: str, given: str | None, runs_on: str | None
) -> None:
    java: list[dict[str, str]] = []  # its settings, once it is connected to
    if given is not None:
        os.environ["PYSPARK_GATEWAY_PORT"] = "1"
    own_folder = {"spark.local.dir": "/big"} if given == "local[3]" else {}
    submitted = SimpleNamespace(_ensure_initialized=lambda: java.append({"spark.master": str(given)} | own_folder))
    monkeypatch.setattr(spark_session, "SparkContext", submitted)
    monkeypatch.setattr(spark_session, "SparkConf", lambda: java[0] if java else {})
    started(f'spark.master="{own}"')
    assert builder.settings.get("spark.master") == runs_on
    assert ("spark.authenticate" in builder.settings) == (runs_on or "").startswith("local")
    assert ("spark.local.dir" in builder.settings) == (runs_on == "local[2]")  # or it has one


@pytest.mark.parametrize(
    ("conf", "tasks"), [("{}", "2"), ('{ "spark.databricks.delta.snapshotPartitions" = "16" }', "16")]
)
def test_a_tables_log_is_read_in_two_tasks_unless_the_configuration_says_otherwise(
    builder: Builder, conf: str, tasks: str
) -> None:
    started(f"spark.conf={conf}")
    assert builder.settings["spark.databricks.delta.snapshotPartitions"] == tasks


@pytest.mark.parametrize("databricks", [True, False])
def test_the_session_of_databricks_keeps_its_own_delta(builder: Builder, databricks: bool) -> None:
    if databricks:
        os.environ["DATABRICKS_RUNTIME_VERSION"] = "15.4"
    started('spark.master=""')
    delta = {"spark.sql.extensions", "spark.sql.catalog.spark_catalog"}
    assert delta & builder.settings.keys() == (set() if databricks else delta)
    assert builder.settings["spark.sql.session.timeZone"] == "UTC"


def test_java_and_python_may_both_take_names_as_latin_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    spark_session.refuse_other_names("ISO-8859-1")
    with pytest.raises(TrailvecError, match=r"as EUC-JP-LINUX and Python as iso8859-1, so files"):
        spark_session.refuse_other_names("EUC-JP-LINUX")  # a name of Java's alone


def test_with_lc_all_c_java_takes_names_as_utf_8() -> None:
    show = (
        "import subprocess; from jobs.spark_session import java_home, names_in_utf8; names_in_utf8();"
        "subprocess.run([f'{java_home()}/bin/java', '-XshowSettings:properties', '-version'], check=True)"
    )
    command, environment = [sys.executable, "-c", show], os.environ | {"LC_ALL": "C"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"sun\.jnu\.encoding = (.*)", said) == ["UTF-8"]
