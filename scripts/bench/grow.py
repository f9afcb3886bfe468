"""What growing a model costs and gives, beside training anew: python scripts/bench/grow.py [--quick] [--events 6e5]

A superapp's log. The stage `train` makes a model of all but its last three weeks. Then the cutoffs move on by a week,
as they do before a training, and it continues that model over the rows of the users who acted since (train.warm_start),
and trains another one from scratch. The week after the later cutoff validates all of them, the first as it was too.
One round per seed.

The last line is one JSON object, of medians: speedup (seconds of the training loop, anew / grown), speedup_of_stage
(the same of the whole stage), share_of_quality (ndcg@10, grown / anew), and for `before`, `grown` and `anew` the
ndcg@10 and the seconds. A chart goes to build/bench/grow.svg.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from incremental import STAGES, run_all
from measure import bars, last_line, log, options, run_main, runtime, session
from pyspark.sql import SparkSession
from superapp import START, World, write

from jobs import train
from jobs.model_folders import model_folder
from jobs.runtime import Runtime
from training.checkpoint import read_about

WEEK = timedelta(days=7)
# Of base.toml's settings those that decision 25 trains with.
SETTINGS = ("train.processes=2", "train.threads=1", "train.batch_size=16", "train.learning_rate=0.0007")
EPOCHS = 6
AS_IT_WAS = ("train.warm_start=true", "train.learning_rate=1e-12")  # nothing moves


def trained(lake: Runtime, what: str) -> tuple[str, dict[str, float]]:
    """The model's version, and its ndcg@10, seconds of training and of the stage. Logs them, as `what`."""
    report = lake.execute(train.STAGE)
    # Not the model in use, which `model.version` names where a model is grown: the one just trained.
    version: str = json.loads((lake.models / "current.json").read_text())["model_version"]
    training = read_about(model_folder(lake, version))["training"]
    ndcg = training["epochs"][training["best_epoch"] - 1]["ndcg@10"]
    log(f"{what}: ndcg@10 {ndcg:.4f}, {training['seconds']:.1f} s, stage {report.seconds:.1f} s")
    return version, {"ndcg": ndcg, "s": training["seconds"], "stage_s": report.seconds}


def measure(spark: SparkSession, events: int, seeds: Sequence[int], folder: Path, epochs: int) -> dict[str, Any]:
    data = folder / f"grow-{events}"
    shutil.rmtree(data, ignore_errors=True)
    world = World.of_events(events)
    write(spark, world, data / "superapp")
    end = START + timedelta(days=world.days)

    def lake(cut: datetime, *sets: str) -> Runtime:
        cuts = [
            f"sequences.{name}={time:%Y-%m-%dT%H:%M:%SZ}"
            for name, time in (("valid_from", cut), ("test_from", cut + WEEK))
        ]
        return runtime(spark, data / "warehouse", data, *SETTINGS, f"train.epochs={epochs}", *cuts, *sets)

    earlier, later = end - 3 * WEEK, end - 2 * WEEK
    run_all(lake(earlier), STAGES, f"data up to {earlier:%F}")
    bases = {seed: trained(lake(earlier, f"train.seed={seed}"), f"seed {seed}, a week earlier")[0] for seed in seeds}
    run_all(lake(later), STAGES, f"data up to {later:%F}")
    rounds: dict[str, list[dict[str, float]]] = {"before": [], "grown": [], "anew": []}
    for seed, base in bases.items():
        grow = f'model.version="{base}"', f"train.seed={seed}"
        for name, sets in (
            ("before", (*AS_IT_WAS, *grow)),
            ("grown", ("train.warm_start=true", *grow)),
            ("anew", (f"train.seed={seed}",)),
        ):
            rounds[name].append(trained(lake(later, *sets), f"seed {seed}, {name}")[1])
    shutil.rmtree(data)

    quality = {name: statistics.median(one["ndcg"] for one in of) for name, of in rounds.items()}
    bars(
        folder / "grow.svg",
        {f"{name}: ndcg@10 {quality[name]:.4f}": [one["s"] for one in of] for name, of in rounds.items()},
        unit="s of training",
    )

    def ratio(figure: str, one: str, other: str) -> float:
        pairs = zip(rounds[one], rounds[other], strict=True)
        return statistics.median(a[figure] / b[figure] for a, b in pairs)

    return {
        "events": events,
        "seeds": len(seeds),
        "speedup": ratio("s", "anew", "grown"),
        "speedup_of_stage": ratio("stage_s", "anew", "grown"),
        "share_of_quality": ratio("ndcg", "grown", "anew"),
        **{
            f"{name}_{figure}": statistics.median(one[figure] for one in of)
            for name, of in rounds.items()
            for figure in ("ndcg", "s", "stage_s")
        },
    }


def main() -> None:
    parser = options(
        __doc__,
        quick="10,000 events, one seed, one epoch: only to see that it runs",
        folder="the log, the tables and the chart",
    )
    parser.add_argument("--events", type=float, help="approximate number of events (default: 6e5)")
    parser.add_argument("--seeds", type=int, help="rounds, each with a seed of its own (default: 3; quick: 1)")
    arguments = parser.parse_args()
    events = int(arguments.events or (1e4 if arguments.quick else 6e5))
    seeds = range(arguments.seeds or (1 if arguments.quick else 3))
    spark = session(arguments.quick, tiny=arguments.quick)
    result = measure(spark, events, seeds, arguments.folder.absolute(), 1 if arguments.quick else EPOCHS)
    spark.stop()
    last_line(result)


if __name__ == "__main__":
    run_main(main)
