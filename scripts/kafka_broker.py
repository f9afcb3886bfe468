"""A real Kafka broker for tests and trials: one node (KRaft, no ZooKeeper), reachable from this machine alone.

    python -m scripts.kafka_broker --data build/kafka             prints its address, runs until interrupted

    with Broker(tmp_path / "kafka") as broker:                    in a test
        df.write.format("kafka").option("kafka.bootstrap.servers", broker.address) ...
        broker.kill()                                             simulates a crash
        broker.start()                                            on the same data and port

Uses Spark's jars and those that scripts/setup.sh put into .venv/kafka.
"""

from __future__ import annotations

import argparse
import base64
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyspark

from jobs.errors import TrailvecError
from jobs.spark_session import java_home
from scripts.servers import HOST, failed, free_ports, run

# A topic is created on the first write, with three partitions, so that order across partitions is not guaranteed.
_SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
log.dirs={logs}
num.partitions=3
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
"""
_LOGGING = """\
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1}: %m%n%ex
logger.start.name=kafka.server.KafkaRaftServer
logger.start.level=info
"""
_READY = "Kafka Server started"  # logged once clients may connect
_PATIENCE = 180.0  # seconds to start or to stop; an idle machine needs three


class Broker:
    """A broker over one data folder; as a context manager it runs inside the block.

    Attributes:
        address: host:port for `kafka.bootstrap.servers`; the same after a restart.
    """

    def __init__(self, data: Path, port: int | None = None) -> None:
        """
        Args:
            data: holds the broker's data, settings and log (broker.log); created if missing.
            port: None: the port of the broker that used this folder before, else a free one.
        """
        self._data = data.absolute()
        self._settings = self._data / "server.properties"
        self._log = self._data / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"{HOST}:{port or self._port_before() or free_ports(1)[0]}"

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once clients may connect.

        Raises:
            TrailvecError: the jars are missing, or the broker exited or did not start in time; quotes its last log
                lines.
        """
        self._data.mkdir(parents=True, exist_ok=True)
        (self._data / "log4j2.properties").write_text(_LOGGING)
        settings = _SETTINGS.format(
            port=self.address.split(":")[1], controller=free_ports(1)[0], logs=self._data / "topics"
        )
        self._settings.write_text(settings)
        with self._log.open("wb") as log:
            if not (self._data / "topics" / "meta.properties").exists():
                cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
                # As one argument, since one id in 64 begins with a minus.
                options = [f"--cluster-id={cluster}", "-c", str(self._settings)]
                command = self._java("kafka.tools.StorageTool", "format", *options)
                if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                    raise self._failed("could not format its folder")
            # Its own process group, so that Ctrl-C reaches only this script, which then stops the broker.
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._settings)), stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + _PATIENCE
        while _READY not in self._log.read_text(errors="replace"):
            if self._process.poll() is not None:
                raise self._failed("exited while starting")
            if time.monotonic() > until:
                self.kill()
                raise self._failed(f"did not start within {_PATIENCE:.0f} s")
            time.sleep(0.1)

    def stop(self) -> None:
        """Shuts the broker down cleanly; does nothing if it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the broker with SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def check(self) -> None:
        """Does nothing while the broker runs.

        Raises:
            TrailvecError: it has exited; quotes its last log lines.
        """
        if self._process is None or self._process.poll() is not None:
            raise self._failed("has exited")

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)  # a no-op if it has already exited
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _java(self, main: str, *arguments: str) -> list[str]:
        own, sparks = Path(sys.prefix) / "kafka", Path(pyspark.__file__).parent / "jars"
        if not any(own.glob("kafka_*.jar")):
            raise TrailvecError(f"the broker's jars are not in {own}: run scripts/setup.sh")
        return [
            f"{java_home()}/bin/java",
            "-Xmx256m",
            "-XX:TieredStopAtLevel=1",  # starts in half the time
            f"-Dlog4j2.configurationFile={self._data / 'log4j2.properties'}",
            "-cp",
            f"{own}/*:{sparks}/*",
            main,
            *arguments,
        ]

    def _port_before(self) -> int | None:
        if not self._settings.exists():
            return None
        listeners = next(line for line in self._settings.read_text().splitlines() if line.startswith("listeners="))
        return int(listeners.split(",")[0].rpartition(":")[2])

    def _failed(self, what: str) -> TrailvecError:
        return failed(f"the broker at {self.address} {what}", self._log)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a real Kafka broker, one node on the loopback.")
    parser.add_argument(
        "--data", type=Path, default=Path("build/kafka"), help="folder for its data (default: build/kafka)"
    )
    parser.add_argument("--port", type=int, help="default: the port last used with that data, otherwise a free one")
    arguments = parser.parse_args()
    broker = Broker(arguments.data, arguments.port)
    run(broker, broker.check, lambda: broker.address)


if __name__ == "__main__":
    main()
