"""embed_items: items + the model in use → item_embeddings: the vectors of all items that the model knows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.runtime import Runtime, Stage
from jobs.tables import ITEM_EMBEDDINGS, ITEMS
from training.checkpoint import read_about, read_vectors


def vectors_table(spark: SparkSession, vectors: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> DataFrame:
    """(item_index, vector) of the items with a count: those that the model knows."""
    known = np.flatnonzero(counts)
    frame = pd.DataFrame({"item_index": known.astype(np.int32), "vector": list(vectors[known])})
    return spark.createDataFrame(frame, "item_index int, vector array<float>")


def run(runtime: Runtime) -> None:
    folder = runtime.model_dir()
    about = read_about(folder)
    vectors = vectors_table(runtime.spark, *read_vectors(folder))
    rows = (
        runtime.read(ITEMS)
        .join(vectors, "item_index")
        .withColumn("model_version", F.lit(about["model_version"]))
        .withColumn("as_of", F.to_timestamp(F.lit(about["as_of"])))
    )
    runtime.write(ITEM_EMBEDDINGS, rows)


STAGE = Stage(
    "embed_items",
    "write the vectors of the items that the model knows",
    run,
    reads=(ITEMS,),
    writes=(ITEM_EMBEDDINGS,),
    settings=(),
    inputs=lambda runtime: {"model_version": runtime.model_dir().name},
)


def main() -> None:
    stage_main("embed_items")


if __name__ == "__main__":
    main()
