"""Spark's messages as a user reads them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from jobs.errors import _MADE_AGAIN, _ONLY_HERE, FETCH_AGAIN, ONLY_HERE, explain, first_line
from jobs.tables import TABLES

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
_LOST = "Some data may have been lost because they are not available in Kafka any more; either the data was aged out"
_CHANGES = "cdc-00000-591396bc-522d-405c-87c4-377008e1ad49.c000.snappy.parquet"
_ROWS = "part-00001-0b7f0a2c-7a2e-4b52-9a55-0e4f6a1a2b3c-c000.snappy.parquet"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "TimeoutException: Timed out waiting for a node assignment. Call: describeTopics",
            "no connection to a Kafka broker: start it, or correct bootstrap_servers and what the input's "
            "kafka.options say of credentials",
        ),
        (
            "UnknownTopicOrPartitionException: This server does not host this topic-partition.",
            "the Kafka broker has no such topic: create it, or correct the input's topic",
        ),
        (
            "java.lang.IllegalStateException: Cannot fetch offset 30 (GroupId: spark-kafka-source-1-executor, "
            f"TopicPartition: views-2). \n{_LOST}",
            "records of views-2 from offset 30 on were removed from the topic before they were read: set "
            'failOnDataLoss = "false" in the input\'s kafka.options to continue without them',
        ),
        (
            "Partition views-0's offset was changed from 30 to 10, some data may have been missed. \n" + _LOST,
            "views-0 holds fewer records than were read from it: the topic was recreated, or is another cluster's; run "
            "`trailvec ingest --force` once, which reads all of it, or give the input another `name`",
        ),
        (
            f"Added partition views-3 starts from 7 instead of 0. {_LOST}",
            "records were removed from the topic before they were read: set failOnDataLoss = "
            '"false" in the input\'s kafka.options to continue without them',
        ),
        (
            f"Set(views-2, views-1) are gone. Some data may have been missed. {_LOST}",
            "partitions views-2, views-1 are gone: the topic was recreated with fewer, or is another cluster's; "
            "run `trailvec ingest --force` once, which reads all of it, or give the input another `name`",
        ),
        (
            "[UNRESOLVABLE_TABLE_VALUED_FUNCTION] Could not resolve `nearest_items` to a table-valued function. Please",
            "nearest_items reads the tables' files itself and needs them on a local disk, which storage.root is not: "
            "read the view current_neighbours instead",
        ),
        (
            "[PATH_NOT_FOUND] Path does not exist: file:/data/my logs/x.parquet.",
            "file:/data/my logs/x.parquet does not exist: correct the path in the query or mapping",
        ),
        (
            "[PATH_NOT_FOUND] Path does not exist: dbfs:/Volumes/a/b/*.json. SQLSTATE: 42K03\nFile <command-1>",
            "dbfs:/Volumes/a/b/*.json does not exist: correct the path in the query or mapping",
        ),
        (
            'org.apache.hadoop.fs.UnsupportedFileSystemException: No FileSystem for scheme "s3"',
            "Hadoop knows no s3:// here: correct the path (on S3 it begins with s3a://), or add that store's jars",
        ),
        (
            "java.nio.file.AccessDeniedException: s3a://b/my logs/x.csv: getFileStatus on s3a://b/my logs/x.csv: 403",
            "s3a://b/my logs/x.csv: the store refuses the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or this "
            "operation with them: correct the keys, or grant the permission (docs/operations.md)",
        ),
        *(
            (said, "another job wrote to the same table at the same time: run this stage again")
            for said in (
                "[DELTA_METADATA_CHANGED] MetadataChangedException: The metadata of the Delta table has been changed",
                "io.delta.exceptions.ProtocolChangedException: The protocol version of the Delta table has been",
            )
        ),
        (
            "[PARQUET_TYPE_ILLEGAL] Illegal Parquet type: INT64 (TIMESTAMP(NANOS,true)).",
            "an input Parquet file has times in nanoseconds, which Spark can't read: write it again with "
            'coerce_timestamps="us" (pandas, pyarrow)',
        ),
        (
            "[COLUMN_ALREADY_EXISTS] The column `an id` already exists. Consider to choose another name or rename the",
            "several columns are named `an id` (ignoring case): give each its own name, the same in all files of an "
            "input",
        ),
        (
            "java.io.IOException: unexpected end of stream",
            "a compressed input file is truncated (gzip -t FILE or bzip2 -t FILE tells which): fetch it again, or take "
            "it out of the folder (a good copy that comes later needs another name)",
        ),
        (
            "java.lang.RuntimeException: native zStandard library not available: this version of libhadoop was built",
            "Hadoop can't read .zst files here, and the input has one: compress it with gzip or bzip2",
        ),
        (
            "java.net.URISyntaxException: Relative path in absolute URI: .a b:1.csv.crc",
            "a b:1.csv: Hadoop can't read a file with a colon in its name, nor a pattern's other files beside it: "
            "rename it",
        ),
        (
            "org.apache.hadoop.security.AccessControlException: Permission denied: user=ann, access=WRITE, "
            'inode="/trailvec":hdfs:supergroup:drwxr-xr-x',
            'Permission denied: user=ann, access=WRITE, inode="/trailvec":hdfs:supergroup:drwxr-xr-x: run as a user '
            "with this permission, or ask the owner to grant it",
        ),
        (
            "java.net.ConnectException: Call From here/10.0.0.7 to master:8020 failed on connection exception: "
            "java.net.ConnectException: Connection refused; For more details see:  wiki",
            "master:8020 does not answer: start it, or correct the host and port in storage.root, ingest.data_dir, "
            "the path given or HADOOP_CONF_DIR",
        ),
        *(
            (
                f"Caused by: org.apache.spark.SparkFileNotFoundException: {said}\nIt is possible the underlying files",
                f"{file} of table events is gone: a VACUUM deleted what this stage continues from (was "
                "maintain.retention_hours raised, or VACUUM run by hand?): run the stage once with --force; if that "
                "stops at the same file, the table itself lacks it: restore it from a backup",
            )
            for said, file in (
                (f"File file:/my t/tables/events/_change_data/{_CHANGES} does not exist", f"_change_data/{_CHANGES}"),
                (f"File does not exist: /trailvec/tables/events/{_ROWS}", _ROWS),
                (f"No such file or directory: s3a://b/t/tables/events/{_ROWS}", _ROWS),
            )
        ),
        *(
            (
                said,
                f"{file} of table {table} is damaged: restore it from a backup (never delete only this file{more})"
                + ("" if more else ", or move the table's folder away and run the stage that creates it"),
            )
            for said, file, table, more in (
                (
                    f"[CANNOT_READ_FILE_FOOTER] Could not read footer for file: file:/t/tables/events/day=1/{_ROWS}. "
                    "Please ensure that the file is in either ORC or Parquet format.",
                    f"day=1/{_ROWS}",
                    "events",
                    ", nor move the table away: its rows are stored nowhere else",
                ),
                (
                    f"RuntimeException: s3a://b/my t/tables/sessions/{_ROWS} is not a Parquet file. "
                    "Expected magic number at tail, but found [1, 2, 3, 4]",
                    _ROWS,
                    "sessions",
                    "",
                ),
            )
        ),
        *(
            (
                f"RuntimeException: s3a://b/my t/tables/{table}/_change_data/{_CHANGES} is not a Parquet file. ",
                f"_change_data/{_CHANGES} of table {table}, which holds only changes, is damaged: run this stage once "
                "with --force (erase_users --finish: run it after maintain_tables has removed the file)",
            )
            for table in ("events", "sessions")
        ),
        *(
            (
                said,
                f"{file} is not a complete Parquet file (truncated?): {FETCH_AGAIN}",
            )
            # The last one's table is not ours.
            for file in ("file:/data/my logs/part-1.parquet", f"file:/landing/tables/orders/{_ROWS}")
            for said in (
                f"Could not read footer for file: {file}. Please ensure that the file is in either",
                f"SparkException: Job aborted: java.lang.RuntimeException: {file} is not a Parquet file. Expected",
            )
        ),
        (
            "org.apache.spark.SparkException: Checkpoint block rdd_1_3 not found! Either the executor\nthat originally",
            "a machine that held rows computed by this stage is gone: run the stage again; nothing already "
            "committed is lost",
        ),
        *(
            (
                said,
                "a Spark process was lost or ran out of memory: increase spark.driver.memory or spark.executor.memory, "
                "and memoryOverhead (docs/sizing.md), and run this stage again; nothing already committed is "
                "lost",
            )
            for said in (
                "java.lang.OutOfMemoryError: Java heap space",
                "org.apache.spark.memory.SparkOutOfMemoryError: [UNABLE_TO_ACQUIRE_MEMORY] Unable to acquire 65536",
                "org.apache.spark.SparkException: Python worker exited unexpectedly (crashed)",
                "ExecutorLostFailure (executor 2 exited caused by one of the running tasks) Reason: Container from a "
                "bad node: container_1 on host: w. Exit status: 137. Diagnostics: Container killed on request.",
            )
        ),
    ],
)
def test_a_message_of_spark_becomes_a_sentence(said: str, told: str) -> None:
    assert explain(RuntimeError(f"An error occurred while calling o1.load.\n: {said}\n\tat org.apache")) == told


def test_a_jvm_that_was_killed_is_told() -> None:
    for lost in (ConnectionRefusedError(111, "Connection refused"), RuntimeError("Answer from Java side is empty")):
        assert (explain(lost) or "").startswith("a Spark process was lost or ran out of memory: ")
    assert explain(RuntimeError("<urlopen error [Errno 111] Connection refused>")) is None


def test_a_missing_file_of_somebody_else_is_none_of_a_tables() -> None:
    for file in ("logs/2024/part-1.parquet", "tables/events/clicks.parquet", f"logs/{_ROWS}"):
        assert explain(RuntimeError(f"java.io.FileNotFoundException: File does not exist: /data/{file}")) is None


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            "An error occurred while calling o55.load.\n: java.io.IOException: gone\n\tat org",
            "java.io.IOException: gone",
        ),
        (
            "An error occurred while calling o5.f. Trace:\npy4j.Py4JException: no f\n\tat py4j",
            "py4j.Py4JException: no f",
        ),
        ("An error occurred while calling o5.f", "An error occurred while calling o5.f"),
        (
            "An error occurred while calling o5.f\n: org.apache.SparkException: awaitResult:\n\tat org\n"
            "Caused by: org.apache.SparkException: Job ended\n\tat org\nCaused by: java.lang.RuntimeException: boom\n",
            "java.lang.RuntimeException: boom",
        ),
        (
            "\n  An exception was thrown from the Python worker. Please see the stack trace below.\n"
            "Traceback (most recent call last):\n  File a\nKeyError: 'k'\n\nDuring handling of that:\n\n"
            "Traceback (most recent call last):\n  File b\n    f()\nTypeError: f() missing 'b'\n\n\tat org\n"
            "Caused by: java.io.EOFException\n",
            "TypeError: f() missing 'b'",
        ),
        ("\none\ntwo", "one"),
        ("", ""),
    ],
)
def test_the_first_line_is_the_errors_own(said: str, first: str) -> None:
    assert first_line(RuntimeError(said)) == first


def test_of_each_table_it_is_known_whether_a_stage_can_make_it_again() -> None:
    assert sorted(f"{_MADE_AGAIN}|{_ONLY_HERE}".split("|")) == sorted(table.name for table in TABLES)
    upgrade = OPERATIONS.partition("## Upgrade")[2].partition("\n## ")[0]
    told = [set(re.findall(r"`(\w+)`", point.partition(": ")[0])) for point in upgrade.split("\n- ")[1:]]
    assert told[0] == set(_MADE_AGAIN.split("|"))
    assert set().union(*told[1:]) == set(ONLY_HERE)


def test_the_messages_quoted_in_the_handbook_are_ours() -> None:
    rows = OPERATIONS.partition("## What an alarm means")[2].partition("\n## ")[0]
    quotes = re.findall(r"`([^`]+)`", "\n".join(line.split(" | ")[0] for line in rows.splitlines() if "| " in line))
    quotes = [quote for quote in quotes if "…" in quote or " " in quote]  # not a stage's name
    assert len(quotes) > 20
    code = [ast.parse(file.read_text()) for folder in ("jobs", "training") for file in (ROOT / folder).glob("*.py")]
    said = "\n".join(_said(node) for module in code for node in ast.walk(module))
    for quote in quotes:
        parts = re.split(r"…|TRAILVEC_\w+|hdfs://", quote)  # what stands for values
        assert all(part.strip() in said for part in parts), quote


def _said(node: ast.AST) -> str:
    """The text of a string, with … where an f-string has a value; empty for what is no string."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(part) or "…" for part in node.values)
    return node.value.replace("\n", " ") if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
