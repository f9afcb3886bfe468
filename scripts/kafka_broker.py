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
import contextlib
import subprocess
import sys
import uuid
from pathlib import Path

import pyspark

from jobs.errors import TrailvecError
from jobs.spark_session import java_home
from scripts.servers import HOST, OneProcess, free_ports, run

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


class Broker(OneProcess):
    """A broker over one data folder.

    Attributes:
        address: host:port for `kafka.bootstrap.servers`; the same after a restart.
    """

    def __init__(self, data: Path, port: int | None = None) -> None:
        """
        Args:
            data: holds the broker's data, settings and log (broker.log); created if missing.
            port: None: the port of the broker that used this folder before, else a free one.
        """
        self._settings = data.absolute() / "server.properties"
        self.address = f"{HOST}:{port or self._port_before() or free_ports(1)[0]}"
        super().__init__(data, "broker.log", f"the broker at {self.address}", _PATIENCE)

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
        if not (self._data / "topics" / "meta.properties").exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            # As one argument, since one id in 64 begins with a minus.
            options = [f"--cluster-id={cluster}", "-c", str(self._settings)]
            command = self._java("kafka.tools.StorageTool", "format", *options)
            with self._log.open("wb") as log:
                if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                    raise self._failed("could not format its folder")
        self._run(
            self._java("kafka.Kafka", str(self._settings)), lambda: _READY in self._log.read_text(errors="replace")
        )

    def stop(self) -> None:
        """Shuts the broker down cleanly; does nothing if it is not running."""
        if self._process is None:
            return
        self._process.terminate()  # a no-op if it has already exited
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self.kill()

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
