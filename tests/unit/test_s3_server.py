"""The tests' S3 server is a real one: it asks for signed requests, and what it took outlives a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow import fs

from jobs.errors import TrailvecError
from scripts.s3_server import REGION, S3Server

REPOSITORY = Path(__file__).parents[2]


def put(system: fs.FileSystem, path: str, content: bytes) -> None:
    with system.open_output_stream(path) as file:
        file.write(content)


def test_what_was_written_outlives_a_kill_and_wrong_keys_are_refused(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server:
        server.filesystem.create_dir("bucket")
        large = bytes(range(256)) * 100_000  # in more than one part
        put(server.filesystem, "bucket/a/large", large)
        server.kill()
        with pytest.raises(TrailvecError, match="has exited"):
            server.check()
        server.start()
        server.check()
        assert server.filesystem.open_input_file("bucket/a/large").read() == large
        stranger = fs.S3FileSystem(
            access_key=server.environment["AWS_ACCESS_KEY_ID"],
            secret_key="another",
            endpoint_override=server.endpoint,
            region=REGION,
        )
        with pytest.raises(OSError, match="ACCESS_DENIED"):
            stranger.open_input_file("bucket/a/large")


def test_the_script_says_what_to_export_and_stops_when_told(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.s3_server", "--data", tmp_path / "s3", "--bucket", "trials"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as script:
        assert script.stdout is not None
        said = dict(script.stdout.readline().removeprefix("export ").strip().split("=", 1) for _ in range(5))
        options = {**said, "AWS_ALLOW_HTTP": "true"}
        write_deltalake("s3://trials/t", pa.table({"a": [1, 2]}), storage_options=options)
        assert DeltaTable("s3://trials/t", storage_options=options).to_pyarrow_table()["a"].to_pylist() == [1, 2]
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0
    with pytest.raises(OSError, match="trials"):
        write_deltalake("s3://trials/u", pa.table({"a": [1]}), storage_options={**options, "max_retries": "0"})


def test_a_missing_program_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(TrailvecError, match=r"program .*/bin/weed does not exist: run scripts/setup.sh"):
        S3Server(tmp_path / "s3").start()
