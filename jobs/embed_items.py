"""embed_items: items + context_values + the model in use → item_embeddings: a vector for every item.

An item that the model knows gets the vector learnt for it. Any other (too rare in training, or newer than the model) is
cold: its vector is what the model learnt about its category, its vertical and its price, as they are today. An item of
which the model knows none of these gets no row. The vectors are written with the rotation that `trailvec align` found.
"""

from __future__ import annotations

from pyspark.sql import functions as F

from jobs import align
from jobs.cli import stage_main
from jobs.model_folders import model_folder, model_inputs
from jobs.models import item_vectors
from jobs.runtime import Runtime, Stage
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS
from training.checkpoint import read_description


def run(runtime: Runtime) -> None:
    facts = model_inputs(runtime)  # before the model is read: if it changes meanwhile, the vectors count as stale
    folder = model_folder(runtime)
    about = read_description(folder)  # item_vectors checks the weights
    align.check_again(runtime, folder)
    vectors = (
        item_vectors(runtime, folder)
        .withColumn("model_version", F.lit(about["model_version"]))
        .withColumn("as_of", F.to_timestamp(F.lit(about["as_of"])))
    )
    runtime.write(ITEM_EMBEDDINGS, vectors, note=facts)


STAGE = Stage(
    "embed_items",
    "write the vectors of all items: learnt ones, and for cold items ones derived from category, vertical and price",
    run,
    reads=(ITEMS, CONTEXT_VALUES),
    writes=(ITEM_EMBEDDINGS,),
    settings=(),
    also="It also reads the model and, if the current model was trained again, its alignment.json.",
    inputs=model_inputs,
)


def main() -> None:
    stage_main("embed_items")


if __name__ == "__main__":
    main()
