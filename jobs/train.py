"""train: sequences, items, context_values → a model.

Writes no table but the folder `models/<model_version>` (training/checkpoint.py says what it holds) and then
`models/current.json`, which names the model that the stages after this one use. A model's version is the
fingerprint of what made it, so the same command again finds it there and trains nothing.

The processes (training/loop.py) are started by Horovod's launcher on this machine. They read the data files of
the snapshot that the stage has pinned, never the table's folder, which also holds files of older versions.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.build_sequences import price_bucket
from jobs.build_vocabulary import category_value
from jobs.cli import stage_main
from jobs.config import Config
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage, published, write_json
from jobs.tables import CONTEXT_VALUES, ITEMS, SEQUENCES
from training.batches import MAX_GAP_BUCKET, MAX_HOUR, MAX_PRICE_BUCKET, MAX_SESSION_END, MAX_WEEKDAY
from training.checkpoint import read_about
from training.config import ITEM_ATTRIBUTES, ModelSpec, RunSpec


def item_counts(items: DataFrame, min_count: int) -> npt.NDArray[np.int64]:
    """How often a model may see each item, [largest item_index + 1]; 0 for those that it must not know.

    This is the one place where it is decided what is in a model's vocabulary; the model carries the result.
    """
    rows = items.select("item_index", "train_count").toPandas()
    counts = np.zeros(int(rows["item_index"].max()) + 1 if len(rows) else 2, np.int64)
    counts[rows["item_index"]] = rows["train_count"].where(rows["train_count"] >= min_count, 0)
    return counts


def item_attributes(items: DataFrame, context_values: DataFrame) -> DataFrame:
    """item_index and, for each of ITEM_ATTRIBUTES, the item's number; 0, which says nothing, where it is not known."""
    categories = context_values.where("kind = 'category'").select(
        F.col("value").alias("named"), F.col("value_index").alias("category_index")
    )
    verticals = context_values.where("kind = 'vertical'").select(
        F.col("value").alias("vertical"), F.col("value_index").alias("vertical_index")
    )
    numbered = (
        items.withColumn("named", category_value())
        .join(categories, "named", "left")
        .join(verticals, "vertical", "left")
    )
    number_of = {
        "category": F.coalesce("category_index", F.lit(0)),
        "vertical": F.coalesce("vertical_index", F.lit(0)),
        "price": F.when(F.col("unit_price").isNull(), 0).otherwise(price_bucket(F.col("unit_price"))),
    }
    return numbered.select("item_index", *[number_of[name].cast("int").alias(name) for name in ITEM_ATTRIBUTES])


def attribute_matrix(attributes: DataFrame, names: Sequence[str], items: int) -> npt.NDArray[np.int64]:
    """int64 [len(names), items] of `item_attributes` rows; items without a row have zeros."""
    rows = attributes.toPandas()
    matrix = np.zeros((len(names), items), np.int64)
    for place, name in enumerate(names):
        matrix[place, rows["item_index"]] = rows[name]
    return matrix


def model_spec(config: Config, items: int, context_values: DataFrame) -> ModelSpec:
    """The sizes of the model: those of the configuration, and those of the vocabularies."""
    rows = context_values.groupBy("kind").agg(F.max("value_index").alias("largest")).collect()
    largest = {row["kind"]: row["largest"] for row in rows}
    settings = config.train.model_dump(include=set(ModelSpec.model_fields))
    attribute_sizes = {
        "category": largest.get("category", 1) + 1,
        "vertical": largest.get("vertical", 1) + 1,
        "price": MAX_PRICE_BUCKET + 1,
    }
    context_sizes = {
        "event_type_index": largest.get("event_type", 1) + 1,
        "vertical_index": largest.get("vertical", 1) + 1,
        "gap_bucket": MAX_GAP_BUCKET + 1,
        "session_end": MAX_SESSION_END + 1,
        "hour": MAX_HOUR + 1,
        "weekday": MAX_WEEKDAY + 1,
        "price_bucket": MAX_PRICE_BUCKET + 1,
    }
    return ModelSpec(
        **settings,
        max_length=config.sequences.max_length,
        items=items,
        context_sizes={name: context_sizes[name] for name in config.train.inputs},
        attribute_sizes={name: attribute_sizes[name] for name in config.train.item_attributes},
    )


def snapshot_files(table: str, version: int, split: str) -> list[str]:
    """file:// URLs of the split's active data files in that version of the table, in order."""
    uris = DeltaTable(table, version).file_uris([("split", "=", split)])
    return sorted(f"file://{uri.removeprefix('file://')}" for uri in uris)


def run(runtime: Runtime) -> None:
    version = runtime.fingerprint[:12]
    folder = runtime.models / version
    if (folder / "model.json").exists() and not runtime.forced:
        runtime.report.skipped = True
    else:
        with published(folder) as staging:
            _train(runtime, version, staging)
    write_json(runtime.models / "current.json", {"model_version": version})
    about = read_about(folder)
    training = about["training"]
    best = training["epochs"][training["best_epoch"] - 1]
    scores = ", ".join(f"{name} {best[name]:.4f}" for name in ("recall@10", "ndcg@10") if name in best)
    runtime.report.rows_out["models"] = 1
    runtime.report.notes.append(
        f"model {version}: {training['processes']} processes, loss {training['epochs'][0]['loss']:.3f} → "
        f"{training['epochs'][-1]['loss']:.3f}, best epoch {training['best_epoch']}"
        + (f" ({scores} on {training['held_users']:,} held-out users)" if scores else "")
    )


def _train(runtime: Runtime, version: str, staging: Path) -> None:
    settings = runtime.config.train
    files = {s: snapshot_files(runtime.path(SEQUENCES), runtime.version(SEQUENCES), s) for s in ("train", "valid")}
    footers = [pq.read_metadata(url.removeprefix("file://")) for url in files["train"]]
    rows = sum(footer.num_rows for footer in footers)
    if not rows:
        raise TrailvecError(
            "the train split of table sequences has no rows: no user acted twice before sequences.valid_from"
        )
    counts = item_counts(runtime.read(ITEMS), runtime.config.vocabulary.min_count)
    if not counts.any():
        raise TrailvecError(
            f"no item was seen vocabulary.min_count = {runtime.config.vocabulary.min_count} times in training: lower it"
        )
    newest = F.date_format(F.max("as_of"), "yyyy-MM-dd'T'HH:mm:ss.SSSSSS")
    as_of = runtime.read(SEQUENCES).where("split = 'train'").agg(newest).collect()[0][0]
    spec = RunSpec(
        settings=settings,
        model=model_spec(runtime.config, len(counts), runtime.read(CONTEXT_VALUES)),
        train_files=files["train"],
        train_rows=rows,
        valid_files=files["valid"],
        new_only=runtime.config.sequences.seen_days == 0,
        item_counts=str(staging / "item_counts.npy"),
        item_attributes=str(staging / "item_attributes.npy"),
        output=str(staging),
        about={"model_version": version, "as_of": as_of, "provenance": runtime.provenance()},
    )
    np.save(spec.item_counts, counts)
    attributes = item_attributes(runtime.read(ITEMS), runtime.read(CONTEXT_VALUES))
    np.save(str(spec.item_attributes), attribute_matrix(attributes, settings.item_attributes, len(counts)))
    run_file = staging / "run.json"
    run_file.write_text(spec.model_dump_json(indent=2))
    launch(run_file, spec, runtime.on_progress)
    for name in ("item_counts.npy", "item_attributes.npy"):  # the model carries them
        (staging / name).unlink()


def launch(run_file: Path, spec: RunSpec, on_progress: Callable[[str], None]) -> None:
    """Runs the training processes on this machine to their end, handing on what rank 0 says.

    Raises:
        TrailvecError: a process failed; the message holds the last thing that it said.
    """
    processes, threads = spec.settings.processes, spec.settings.threads
    command = [sys.executable, "-m", "training.loop", str(run_file)]
    if processes > 1:
        horovodrun = [sys.executable, "-m", "horovod.runner.launch"]
        command = [*horovodrun, "--gloo", "-np", str(processes), "-H", f"localhost:{processes}", *command]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # Python's own modules of this checkout or wheel, wherever the command was started.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call and takes no lock
    )
    assert child.stdout is not None
    assert child.stderr is not None
    errors: deque[str] = deque(maxlen=400)
    listener = threading.Thread(target=errors.extend, args=(child.stderr,), daemon=True)
    listener.start()
    try:
        for line in child.stdout:
            text = re.sub(r"^\[0\]<stdout>:", "", line.rstrip())
            if text.startswith("epoch "):
                on_progress(text)
        code = child.wait()
    finally:
        # Ctrl-C or an error here: Horovod's launcher ends its processes when it is asked to end.
        child.terminate()
        child.wait()
    listener.join()
    if code != 0:
        raise TrailvecError(f"training stopped: {last_words(list(errors), code)}; the old model stays current")


def last_words(lines: list[str], code: int) -> str:
    """What a failed run's error output says about its cause: the last exception, else the last line."""
    texts = [re.sub(r"^\[\d+\]<std(?:err|out)>:", "", line.strip()) for line in lines]
    exceptions = [found[1] for text in texts if (found := re.match(r"[\w.]*(?:Error|Exception): (.+)", text))]
    spoken = exceptions or [text for text in texts if text] or [f"exit code {code}"]
    return spoken[0] if exceptions else spoken[-1]


def _die_with_parent() -> None:
    """In the child: SIGTERM when this stage dies, even by kill -9 (Linux; elsewhere it does nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


STAGE = Stage(
    "train",
    "train the model of next actions (Horovod, Petastorm, Transformers4Rec)",
    run,
    reads=(SEQUENCES, ITEMS, CONTEXT_VALUES),
    writes=(),
    settings=("train", "vocabulary", "sequences"),
)


def main() -> None:
    stage_main("train")


if __name__ == "__main__":
    main()
