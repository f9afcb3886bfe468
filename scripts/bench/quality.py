"""How well the model predicts the next item: python scripts/bench/quality.py --events FILE [--seeds 3]

FILE is Parquet with the columns of the events' contract (event_id, user_id, item_id, vertical, event_type, event_ts;
more are allowed). The protocol is that of most papers: a user's last event is the test, the one before it selects the
epoch, the rest trains; all items are ranked, except those that the user already has. The configuration is the same for
every log, conf/leave_one_out.toml; the stages up to build_sequences run once, then for each seed train, embed_items
and evaluate. --quick: one seed, one epoch, to see that it runs.

The last line is one JSON object: ndcg@10 and recall@10 of the model (mean over the seeds), their spread (standard
deviation) and each seed's, the same for the baselines (popularity, item_knn, own_frequency), users and items, and
seconds. Numbers computed against a few sampled negatives instead of all items are not comparable with these.
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from measure import last_line, log, run_main
from pyspark.sql import functions as F

from jobs import build_sequences, build_vocabulary, embed_items, evaluate, flag_users, ingest, sessionize, train
from jobs.config import load_config
from jobs.errors import TrailvecError
from jobs.model_folders import model_folder
from jobs.ranking import FLOORS
from jobs.runtime import Runtime
from jobs.spark_session import start_spark
from jobs.tables import EVALUATION, EVENTS, ITEMS
from training.stores import sha256_of

CONFIG = Path(__file__).parents[2] / "conf/leave_one_out.toml"
NEEDED = ("event_id", "user_id", "item_id", "event_ts")
OPTIONAL = ("vertical", "event_type", "category", "item_name", "amount", "quantity", "time_zone")
METRICS = ("ndcg@10", "recall@10")


def quoted(value: str | list[str]) -> str:
    """A value as TOML, whose strings and lists are written like JSON's."""
    return json.dumps(value, ensure_ascii=False)


def mapping(events: Path) -> str:
    """The source mapping of a file whose columns are named as in `events`.

    Raises:
        TrailvecError: it is not a Parquet file, or a column is missing.
    """
    try:
        names = pq.read_schema(events).names
    except (OSError, pa.ArrowInvalid) as error:
        raise TrailvecError(f"{events} can't be read as Parquet ({error}): name a Parquet file of events") from None
    if missing := [name for name in NEEDED if name not in names]:
        raise TrailvecError(
            f"{events} lacks the columns {', '.join(missing)}; found {', '.join(names)}: rename the ones that hold them"
        )
    lines = [f'{name} = "{name}"' for name in (*NEEDED, *OPTIONAL) if name in names]
    lines += [f'{name} = {{ constant = "{name}" }}' for name in ("vertical", "event_type") if name not in names]
    ignored = [name for name in names if name not in (*NEEDED, *OPTIONAL)]
    return "\n".join(
        [
            'name = "log"',
            "[[input]]",
            f"path = {quoted(glob.escape(events.name))}",
            'format = "parquet"',
            f"ignore = {quoted(ignored)}",
            "[input.columns]",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=Path, required=True, help="a Parquet file of events")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, one model each (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, only to see that it runs")
    parser.add_argument(
        "--split", choices=("valid", "test"), default="test", help="valid to choose settings (default: test)"
    )
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting that differs; repeatable",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench/quality"), help="folder for the tables and models"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: train at least one model")
    started = time.monotonic()
    events = arguments.events.absolute()
    text = mapping(events)
    # Named after the content, so that results for the same file are reused.
    folder = arguments.folder.absolute() / f"{events.stem}-{sha256_of(events)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.toml"
    source.write_text(text, encoding="utf-8")
    places: dict[str, str | list[str]] = {
        "storage.root": str(folder),
        "ingest.data_dir": str(events.parent),
        "ingest.sources": [str(source)],
    }
    sets = [f"{key}={quoted(place)}" for key, place in places.items()]
    quick = ["train.epochs=1", "train.min_steps=0"] if arguments.quick else []
    sets += [f'evaluate.split="{arguments.split}"', *quick, *arguments.sets]

    spark = start_spark(load_config(CONFIG, sets))
    results: list[dict[tuple[str, str], float]] = []
    for seed in range(1 if arguments.quick else arguments.seeds):
        runtime = Runtime(load_config(CONFIG, [*sets, f"train.seed={seed}"]), spark)
        runtime.on_progress = log
        # From the second seed on, all but the last three find their tables up to date.
        for stage in (ingest, flag_users, sessionize, build_vocabulary, build_sequences, train, embed_items, evaluate):
            report = runtime.execute(stage.STAGE)
            log(f"seed {seed}  {stage.STAGE.name:16} {report.seconds:6.1f} s  {'  '.join(report.notes)}")
        rows = runtime.latest(EVALUATION).where((F.col("task") == "new") & (F.col("split") == arguments.split))
        rows = rows.where((F.col("model_version") == model_folder(runtime).name) & (F.col("slice") == "all"))
        results.append({(row.method, row.metric): row.value for row in rows.collect()})
    users = rows.agg(F.max("counted")).collect()[0][0]
    counts = {"events": runtime.latest(EVENTS).count(), "items": runtime.latest(ITEMS).count(), "users": users}
    spark.stop()

    result: dict[str, Any] = {}
    for metric in METRICS:
        seeds = [of_seed["model", metric] for of_seed in results]
        result[metric] = statistics.mean(seeds)
        result[f"{metric}_std"] = statistics.stdev(seeds) if len(seeds) > 1 else None
        result[f"{metric}_seeds"] = [round(value, 4) for value in seeds]
        result |= {f"{method}_{metric}": results[0][method, metric] for method in FLOORS}
    last_line({**result, **counts, "split": arguments.split, "seconds": round(time.monotonic() - started)})


if __name__ == "__main__":
    run_main(main)
