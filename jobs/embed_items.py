"""embed_items: items + context_values + the model in use → item_embeddings: a vector for every item.

An item that the model knows has the vector that it learnt. Any other (too rare in training, or newer than the model) is
cold: its vector is what the model learnt about its category, its vertical and its price. An item of which the model
knows none of these gets no row.
"""

from __future__ import annotations

from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.runtime import Runtime, Stage
from jobs.score_users import ship_weights
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS
from jobs.train import item_attributes
from spark_udfs.encode import embed_items
from training.checkpoint import read_about
from training.config import ModelSpec


def run(runtime: Runtime) -> None:
    folder = runtime.model_dir()
    about = read_about(folder)
    names = ModelSpec.model_validate(about["spec"]).attribute_sizes
    items = runtime.read(ITEMS)
    numbers = item_attributes(items, runtime.read(CONTEXT_VALUES)).select("item_index", *names)
    rows = items.select("item_id", "item_index").join(numbers, "item_index")
    weights = ship_weights(runtime.spark, folder, about["weights_sha256"])
    vectors = (
        embed_items(rows.select("item_id", "item_index", *names), weights)
        .withColumn("model_version", F.lit(about["model_version"]))
        .withColumn("as_of", F.to_timestamp(F.lit(about["as_of"])))
    )
    runtime.write(ITEM_EMBEDDINGS, vectors)


STAGE = Stage(
    "embed_items",
    "write the vectors of all items: learnt ones, and of cold items what their category and price say",
    run,
    reads=(ITEMS, CONTEXT_VALUES),
    writes=(ITEM_EMBEDDINGS,),
    settings=(),
    inputs=lambda runtime: {"model_version": runtime.model_dir().name},
)


def main() -> None:
    stage_main("embed_items")


if __name__ == "__main__":
    main()
