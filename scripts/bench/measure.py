"""Shared by the benchmarks of whole stages: a runtime on two cores, memory and spill while a stage runs, charts."""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from matplotlib.figure import Figure
from pyspark.sql import DataFrame, SparkSession

from jobs.config import Config, load_config
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage
from jobs.spark_session import start_spark
from jobs.tables import Table

CORES = 2
CONF = {
    "spark.ui.enabled": "false",
    "spark.driver.memory": "4g",
    "spark.sql.shuffle.partitions": "16",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}
# A short run compiles more than it computes. (Without the optimising compiler, Java reserves only 48 MB for compiled
# code, and interprets whatever no longer fits.)
QUICK = {
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m",
}
# With few rows and many plans, no plan is worth compiling.
TINY = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
}
SOURCE = Path(__file__).parents[2] / "conf/sources/superapp.toml"


def session(quick: bool, tiny: bool = False) -> SparkSession:
    return start_spark(_with_conf(load_config(), CONF | (QUICK if quick else {}) | (TINY if tiny else {})))


def runtime(spark: SparkSession, root: Path, data: Path, *sets: str) -> Runtime:
    """A runtime for stages over the superapp's log in `data`/superapp, with tables under `root`."""
    own = [f'storage.root="{root}"', f'ingest.data_dir="{data}"', f'ingest.sources=["{SOURCE}"]']
    return Runtime(_with_conf(load_config(None, [*own, *sets]), CONF), spark)


def put(lake: Runtime, table: Table, rows: DataFrame) -> None:
    """Makes `rows` the content of the table, as the stage that writes it would."""
    lake.execute(Stage("put", "", lambda r: r.write(table, rows), reads=(), writes=(), settings=()), force=True)


def _with_conf(config: Config, conf: dict[str, str]) -> Config:
    spark = config.spark.model_copy(update={"master": f"local[{CORES}]", "conf": conf})
    return config.model_copy(update={"spark": spark})


# ---- memory and spill -------------------------------------------------------------------------------------


class Watch:
    """Peak memory, work done and spill while its block runs.

    Attributes:
        cpu_s: CPU seconds, by `cpu_seconds`, which a busy machine barely affects.
        peak_mb: by "java" and "python", resident memory of this process's children (Spark's JVM, its workers), sampled
            twice a second; pages shared by workers are counted for each.
        spilled_mb: shuffle data that did not fit into memory, as written to disk.
        shuffled_mb: all shuffle data, as written to disk.
    """

    def __init__(self, spark: SparkSession) -> None:
        self._spark = spark
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.peak_mb = {"java": 0.0, "python": 0.0}
        self.spilled_mb = self.shuffled_mb = 0.0

    def __enter__(self) -> Watch:
        self._before = max((stage.stageId() for stage in stages(self._spark)), default=-1)
        self.cpu_s = -cpu_seconds()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._sampler.join()
        self.cpu_s += cpu_seconds()
        run = [stage for stage in stages(self._spark) if stage.stageId() > self._before]
        self.spilled_mb = sum(stage.diskBytesSpilled() for stage in run) / 1e6
        self.shuffled_mb = sum(stage.shuffleWriteBytes() for stage in run) / 1e6

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            # A process that the JVM has forked but not yet exec'd has the JVM's pages, under a thread's name.
            processes = [(name.rstrip(".0123456789"), megabytes) for name, megabytes, _ in _descendants()]
            for kind in self.peak_mb:
                resident = sum(megabytes for name, megabytes in processes if name == kind)
                self.peak_mb[kind] = max(self.peak_mb[kind], resident)


def stages(spark: SparkSession) -> list[Any]:
    """All stages in Spark's status store, each a StageData of its Java API."""
    context = spark.sparkContext
    jvm: Any = context._jvm
    gateway: Any = context._gateway
    none, quantiles = jvm.java.util.ArrayList(), gateway.new_array(jvm.double, 0)
    return of_scala(context._jsc.sc().statusStore().stageList(none, False, False, quantiles, none))


def of_scala(sequence: Any) -> list[Any]:
    return [sequence.apply(n) for n in range(sequence.size())]


def cpu_seconds() -> float:
    """CPU seconds of this process and its descendants, including those that have exited."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + ended.ru_utime + ended.ru_stime
    return own + sum(seconds for _, _, seconds in _descendants())


def _descendants() -> Iterator[tuple[str, float, float]]:
    """Name, resident megabytes and CPU seconds (those of exited children included) of each process below this one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has exited meanwhile
            yield process.name(), process.memory_info().rss / 1e6, sum(process.cpu_times()[:4])


# ---- time -------------------------------------------------------------------------------------------------

Seconds = dict[str, list[float]]


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this process and its descendants."""
    worked, started = cpu_seconds(), time.perf_counter()
    act()
    return time.perf_counter() - started, cpu_seconds() - worked


def in_turns(
    acts: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: int = 1,
    before: Callable[[int], object] = lambda number: None,
) -> tuple[Seconds, Seconds]:
    """Wall-clock seconds and CPU seconds of each round, by act.

    Args:
        warm: uncounted rounds at the start, in which the JVM warms up.
        before: called with the round's number before each round, not timed.
    """
    clock: Seconds = {name: [] for name in acts}
    cpu: Seconds = {name: [] for name in acts}
    for number in range(1 - warm, rounds + 1):
        before(number)
        for name, act in acts.items():
            seconds, work = timed(act)
            log(f"round {number} {name:22} {seconds:8.2f} s, CPU {work:8.2f} s")
            if number > 0:
                clock[name].append(seconds)
                cpu[name].append(work)
    return clock, cpu


# ---- results ----------------------------------------------------------------------------------------------


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log y against log x by least squares."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points], strict=True)
    return statistics.linear_regression(xs, ys).slope


def options(text: str | None, quick: str, folder: str) -> argparse.ArgumentParser:
    """A parser with the options that nearly all benchmarks have; `folder`: what the folder is for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help=f"folder for {folder}")
    return parser


def last_line(result: dict[str, Any]) -> None:
    """Prints the benchmark's result as the last line, where a script looks for it."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


def environment(folder: Path, name: str, *packages: str) -> Path:
    """The Python of a separate environment, for a peer whose pins conflict with trailvec's; created once, under
    `folder`."""
    place = folder / f"{name}-env"
    python = place / "bin/python"
    if not (place / "whole").exists():
        log(f"an environment is made for {packages[0]} (minutes, once)")
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.11", place], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *packages], check=True)
        (place / "whole").touch()
    return python


def run_main(main: Callable[[], None]) -> None:
    """Runs `main`; an error that the user can fix is one sentence, anything else a stack trace."""
    try:
        main()
    except TrailvecError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def chart(path: Path, title: str, series: dict[str, list[tuple[float, float]]], across: str = "events") -> None:
    """An SVG of seconds against events (or `across`), both on log scales; one line per series."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=across, ylabel="seconds")
    axes.grid(visible=True, color="#ddd")
    axes.legend()
    _save(figure, path)


def bars(path: Path, times: dict[str, list[float]], unit: str = "s") -> None:
    """An SVG with a bar for each median and a point for each round."""
    figure = Figure(figsize=(7, 0.5 + 0.5 * len(times)), layout="constrained")
    axes = figure.subplots()
    medians = [statistics.median(values) for values in times.values()]
    labels = [f"{name}\n{median:.2f} {unit}" for name, median in zip(times, medians, strict=True)]
    axes.barh(labels, medians, color="#9db4c0")
    for row, values in enumerate(times.values()):
        axes.plot(values, [row] * len(values), ".k")
    axes.invert_yaxis()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
