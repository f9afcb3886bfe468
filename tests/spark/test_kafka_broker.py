"""The tests' broker is real, and stops on request. What Spark wrote survives a kill -9: test_ingest_increments.py."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs.errors import TrailvecError
from scripts.kafka_broker import Broker

REPOSITORY = Path(__file__).parents[2]


def write(spark: SparkSession, address: str, first: int, last: int) -> None:
    rows = spark.range(first, last).selectExpr("string(id) AS key", "concat('value ', id) AS value")
    rows.write.format("kafka").option("kafka.bootstrap.servers", address).option("topic", "numbers").save()


def read(spark: SparkSession, address: str) -> list[tuple[str, str]]:
    rows = spark.read.format("kafka").option("kafka.bootstrap.servers", address).option("subscribe", "numbers").load()
    found = rows.selectExpr("string(key) AS key", "string(value) AS value").collect()
    return sorted((row["key"], row["value"]) for row in found)


def expected(last: int) -> list[tuple[str, str]]:
    return sorted((str(number), f"value {number}") for number in range(last))


def answers(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_the_script_says_its_address_stops_cleanly_and_keeps_its_port(spark: SparkSession, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.kafka_broker", "--data", tmp_path / "kafka"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as script:
        assert script.stdout is not None
        address = script.stdout.readline().strip()
        write(spark, address, 0, 10)
        assert read(spark, address) == expected(10)
        script.send_signal(signal.SIGTERM)
        assert script.wait(120) == 0
    assert not answers(address)
    assert Broker(tmp_path / "kafka").address == address


def test_a_taken_port_is_told_with_the_brokers_last_lines(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrailvecError, match=rf"127.0.0.1:{port} exited while starting(.|\n)*already in use"):
            Broker(tmp_path / "kafka", port).start()


def test_missing_jars_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(TrailvecError, match=r"broker's jars are not in .*: run scripts/setup.sh"):
        Broker(tmp_path / "kafka").start()
