"""A real YARN and HDFS for tests and trials, on one machine and reachable from it alone: a NameNode, a DataNode, a
ResourceManager and some NodeManagers, each in its own JVM.

    python -m scripts.yarn_cluster --data build/yarn              prints what to export, runs until interrupted

    with Cluster(tmp_path / "yarn") as cluster:                   in a test
        environment = {"HADOOP_CONF_DIR": str(cluster.conf)}      for spark-submit --master yarn
        cluster.kill("node1")                                     simulates a crash
        cluster.restart("node1")

Uses Spark's jars and those that scripts/setup.sh put into .venv/hadoop. Copy files to HDFS with Spark's own
`spark-class org.apache.hadoop.fs.FsShell -put FOLDER /logs`. The driver and executors of conf/yarn.toml are larger than
these nodes, and more: a configuration that extends it must give each at most 2,560 MB, overhead included, and 4 cores,
and set spark.executor.instances and train.processes to as many as fit beside the driver (with a driver of 2,560 MB, one
executor): Spark waits up to 300 s for all of them at each submission.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyspark

from jobs.errors import TrailvecError
from jobs.spark_session import java_home
from scripts.servers import HOST, failed, free_ports, run

_LOGGING = """\
rootLogger.level=info
rootLogger.appenderRef.out.ref=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1}: %m%n%ex
"""
_MAINS = {
    "namenode": "org.apache.hadoop.hdfs.server.namenode.NameNode",
    "datanode": "org.apache.hadoop.hdfs.server.datanode.DataNode",
    "resourcemanager": "org.apache.hadoop.yarn.server.resourcemanager.ResourceManager",
    "node": "org.apache.hadoop.yarn.server.nodemanager.NodeManager",
}
# Has no queues, so needs no file to define them.
_SCHEDULER = "org.apache.hadoop.yarn.server.resourcemanager.scheduler.fifo.FifoScheduler"
_PATIENCE = 300.0  # seconds to start or to stop; an idle machine needs ten for all daemons


class Cluster:
    """A cluster over one data folder; as a context manager it runs inside the block.

    Its daemons are `namenode`, `datanode`, `resourcemanager`, `node1`, `node2`, ... Applications are lost with the
    ResourceManager; HDFS keeps its files across restarts.

    Attributes:
        data: the folder.
        conf: HADOOP_CONF_DIR for clients.
        root: the file system's URI, hdfs://host:port; the same after a restart.
        webhdfs: the file system's HTTP address.
    """

    def __init__(self, data: Path, nodes: int = 2, memory_mb: int = 2560) -> None:
        """
        Args:
            data: holds HDFS's data, each node's containers (`node1/local`, `node1/logs`), the settings and each
                daemon's log; created if missing.
            memory_mb: memory that each node offers to containers.
        """
        self.data = data.absolute()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = self.data / "conf"
        self._logging = self.data / "log4j2.properties"  # outside conf, which Spark ships to its containers
        namenode, web, *ports = free_ports(7 + nodes)
        manager = ports[:5]
        # Fixed ports: the ResourceManager recognises a node that returns at the same address as the one it lost.
        self._nodes = {f"node{number}": port for number, port in enumerate(ports[5:], 1)}
        self.root = f"hdfs://{HOST}:{namenode}"
        self._web = {"NameNode": f"http://{HOST}:{web}", "ResourceManager": f"http://{HOST}:{manager[0]}"}
        self.webhdfs = f"{self._web['NameNode']}/webhdfs/v1"
        self.conf.mkdir(parents=True, exist_ok=True)
        self._logging.write_text(_LOGGING)
        _write_settings(self.conf / "core-site.xml", {"fs.defaultFS": self.root, "hadoop.tmp.dir": self.data / "tmp"})
        _write_settings(self.conf / "hdfs-site.xml", _hdfs_settings(self.data, namenode, web))
        _write_settings(self.conf / "yarn-site.xml", _yarn_settings(self.data, manager, memory_mb))

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once HDFS accepts files and every node accepts containers.

        Raises:
            TrailvecError: the jars are missing, or a daemon exited or did not start in time; quotes its last log lines.
        """
        try:
            if not (self.data / "name" / "current").exists():
                self._spawn("namenode", "-format", "-nonInteractive")
                if self._processes.pop("namenode").wait(_PATIENCE):
                    raise self._failed("namenode", "could not format its folder")
            for name in ("namenode", "datanode", "resourcemanager", *self._nodes):
                self._spawn(name)
            self._wait("datanode", lambda: self._beans("NameNode", "FSNamesystemState")["NumLiveDataNodes"] == 1)
            self._wait("resourcemanager", lambda: self.live_nodes() == len(self._nodes))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shuts down all daemons cleanly, and their containers."""
        # NodeManagers first, all at once: they stop their containers.
        for names in (self._nodes, [name for name in self._processes if name not in self._nodes]):
            running = [self._processes.pop(name) for name in names if name in self._processes]
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def kill(self, name: str) -> None:
        """Kills a daemon with SIGKILL, as a crash would."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def restart(self, name: str) -> None:
        """Starts a killed daemon again, on the same data."""
        self._spawn(name)

    def check(self) -> None:
        """Does nothing while all daemons run.

        Raises:
            TrailvecError: one has exited; quotes its last log lines.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self._failed(name, "has exited")

    def live_nodes(self) -> int:
        """The number of NodeManagers that the ResourceManager considers active."""
        return int(self._beans("ResourceManager", "ClusterMetrics")["NumActiveNMs"])

    def _beans(self, service: str, name: str) -> dict[str, Any]:
        """One of a daemon's JMX beans."""
        with urllib.request.urlopen(
            f"{self._web[service]}/jmx?qry=Hadoop:service={service},name={name}", timeout=5
        ) as answer:
            return dict(json.load(answer)["beans"][0])

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                if ready():
                    return
            except (OSError, IndexError, KeyError):  # not up yet, or no metrics yet
                pass
            self.check()
            if time.monotonic() > until:
                raise self._failed(name, f"did not start within {_PATIENCE:.0f} s")
            time.sleep(0.2)

    def _spawn(self, name: str, *arguments: str) -> None:
        own, sparks = Path(sys.prefix) / "hadoop", Path(pyspark.__file__).parent / "jars"
        if not any(own.glob("hadoop-client-minicluster-*.jar")):
            raise TrailvecError(f"the cluster's jars are not in {own}: run scripts/setup.sh")
        command = [
            f"{java_home()}/bin/java",
            "-Xmx384m" if name == "resourcemanager" else "-Xmx256m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",  # starts in half the time
            "--add-opens=java.base/java.lang=ALL-UNNAMED",  # Guice reflects into it
            "-Djava.net.preferIPv4Stack=true",
            f"-Dlog4j2.configurationFile={self._logging}",
            f"-Dtrailvec.daemon={name}",  # used in the settings for a node's folders ...
            f"-Dtrailvec.port={self._nodes.get(name, 0)}",  # ... and address
            "-cp",
            f"{self.conf}:{own}/*:{sparks}/*",
            _MAINS["node" if name in self._nodes else name],
            *arguments,
        ]
        # The shell's environment does not reach the containers: whatever a job needs must travel with it.
        environment = {key: os.environ[key] for key in ("HOME", "USER", "TMPDIR") if key in os.environ}
        environment |= {"PATH": "/usr/bin:/bin", "JAVA_HOME": java_home(), "HADOOP_CONF_DIR": str(self.conf)}
        with (self.data / f"{name}.log").open("ab") as log:
            # Its own process group, so that Ctrl-C reaches only this script, which then stops the daemons.
            self._processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.data, env=environment, start_new_session=True
            )

    def _failed(self, name: str, what: str) -> TrailvecError:
        return failed(f"the cluster's {name} {what}", self.data / f"{name}.log")


def _hdfs_settings(data: Path, port: int, web: int) -> dict[str, object]:
    return {
        "dfs.replication": 1,
        "dfs.permissions.enabled": "false",
        "dfs.namenode.name.dir": f"file://{data}/name",
        "dfs.namenode.rpc-address": f"{HOST}:{port}",
        "dfs.namenode.http-address": f"{HOST}:{web}",
        "dfs.namenode.safemode.extension": 0,
        "dfs.namenode.datanode.registration.ip-hostname-check": "false",
        "dfs.datanode.data.dir": f"file://{data}/blocks",
        "dfs.datanode.hostname": "localhost",
        "dfs.datanode.address": f"{HOST}:0",
        "dfs.datanode.ipc.address": f"{HOST}:0",
        "dfs.datanode.http.address": f"{HOST}:0",
    }


def _yarn_settings(data: Path, ports: list[int], memory_mb: int) -> dict[str, object]:
    web, clients, scheduler, tracker, admin = ports
    folder = f"{data}/${{trailvec.daemon}}"  # resolved by each NodeManager
    return {
        "yarn.resourcemanager.hostname": HOST,
        "yarn.resourcemanager.webapp.address": f"{HOST}:{web}",
        "yarn.resourcemanager.address": f"{HOST}:{clients}",
        "yarn.resourcemanager.scheduler.address": f"{HOST}:{scheduler}",
        "yarn.resourcemanager.resource-tracker.address": f"{HOST}:{tracker}",
        "yarn.resourcemanager.admin.address": f"{HOST}:{admin}",
        "yarn.resourcemanager.scheduler.class": _SCHEDULER,
        "yarn.resourcemanager.am.max-attempts": 5,  # the upper limit; each job sets its own
        "yarn.scheduler.minimum-allocation-mb": 128,
        "yarn.scheduler.maximum-allocation-mb": memory_mb,
        "yarn.scheduler.include-port-in-node-name": "true",  # all nodes share one host name
        # Allocates containers and notices a lost node quickly, for tests (defaults: 1 s and 10 minutes).
        "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": 250,
        "yarn.nm.liveness-monitor.expiry-interval-ms": 60000,
        "yarn.nodemanager.address": "localhost:${trailvec.port}",
        "yarn.nodemanager.bind-host": HOST,
        "yarn.nodemanager.localizer.address": f"{HOST}:0",
        "yarn.nodemanager.webapp.address": f"{HOST}:0",
        "yarn.nodemanager.local-dirs": f"{folder}/local",
        "yarn.nodemanager.log-dirs": f"{folder}/logs",
        "yarn.nodemanager.resource.memory-mb": memory_mb,
        "yarn.nodemanager.resource.cpu-vcores": 4,
        # A container that uses more memory than it requested is killed; reserved but unused address space does not
        # count.
        "yarn.nodemanager.pmem-check-enabled": "true",
        "yarn.nodemanager.vmem-check-enabled": "false",
        "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": 99.5,
        # The driver's output, whichever node it ran on.
        "yarn.log-aggregation-enable": "true",
    }


def _write_settings(path: Path, settings: dict[str, object]) -> None:
    lines = [f"<property><name>{k}</name><value>{escape(str(v))}</value></property>" for k, v in settings.items()]
    path.write_text("\n".join(['<?xml version="1.0"?>', "<configuration>", *lines, "</configuration>", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a real YARN and HDFS on the loopback.")
    parser.add_argument(
        "--data", type=Path, default=Path("build/yarn"), help="folder for its data (default: build/yarn)"
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of NodeManagers (default: 2)")
    parser.add_argument(
        "--memory-mb", type=int, default=2560, help="memory of each NodeManager for containers (default: 2560)"
    )
    arguments = parser.parse_args()
    cluster = Cluster(arguments.data, arguments.nodes, arguments.memory_mb)
    run(cluster, cluster.check, lambda: f"export HADOOP_CONF_DIR={cluster.conf}  # {cluster.root}")


if __name__ == "__main__":
    main()
