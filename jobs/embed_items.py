"""embed_items: items + context_values + the model in use → item_embeddings: a vector for every item.

An item that the model knows gets the vector learnt for it. Any other (too rare in training, or newer than the model) is
cold: its vector is what the model learnt about its category, its vertical and its price. An item of which the model
knows none of these gets no row. The vectors are written with the rotation that `trailvec align` found.
"""

from __future__ import annotations

from pathlib import Path

from pyspark.sql import functions as F

from jobs import align
from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.model_folders import model_folder, model_inputs, trained_again
from jobs.models import item_vectors
from jobs.runtime import Runtime, Stage
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS
from training.checkpoint import read_about, read_alignment


def run(runtime: Runtime) -> None:
    folder = model_folder(runtime)
    about = read_about(folder)
    if runtime.newest_current_model() == folder.name and trained_again(runtime, folder):
        _check_again(runtime, folder)
    vectors = (
        item_vectors(runtime, folder)
        .withColumn("model_version", F.lit(about["model_version"]))
        .withColumn("as_of", F.to_timestamp(F.lit(about["as_of"])))
    )
    runtime.write(ITEM_EMBEDDINGS, vectors, note=model_inputs(runtime))


def _check_again(runtime: Runtime, folder: Path) -> None:
    """Raises TrailvecError if the current model, retrained to other weights, must not replace its own vectors, which
    readers see, or `align` has not checked it yet."""
    report = read_alignment(folder)
    if report is None:
        raise TrailvecError(
            f"model {folder.name}, the current one, was trained again and is not aligned with its vectors of before "
            f"yet: run `trailvec align` first"
        )
    if why := align.refusal(report, runtime.config.align):
        raise TrailvecError(why)


STAGE = Stage(
    "embed_items",
    "write the vectors of all items: learnt ones, and of cold items what their category and price say",
    run,
    reads=(ITEMS, CONTEXT_VALUES),
    writes=(ITEM_EMBEDDINGS,),
    settings=(),
    also="It also reads the model and, of the current one that was trained again, its alignment.json.",
    inputs=model_inputs,
)


def main() -> None:
    stage_main("embed_items")


if __name__ == "__main__":
    main()
