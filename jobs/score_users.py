"""score_users: sequences (split = score) + the model in use → user_embeddings: one vector for every user."""

from __future__ import annotations

import shutil
from pathlib import Path

from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.runtime import Runtime, Stage
from jobs.tables import SEQUENCES, USER_EMBEDDINGS
from spark_udfs.encode import encoder
from training.batches import FEATURES
from training.checkpoint import WEIGHTS, read_about
from training.config import ModelSpec


def encode_sequences(sequences: DataFrame, model_dir: Path, batch_size: int) -> DataFrame:
    """The rows of `sequences` (any split) with one more column, `vector`: the state at each row's last action.

    Raises:
        TrailvecError: the model in that folder is damaged.
    """
    about = read_about(model_dir)
    weights = ship_weights(sequences.sparkSession, model_dir, about["weights_sha256"])
    encode = encoder(ModelSpec.model_validate(about["spec"]), weights, batch_size)
    return sequences.withColumn("vector", encode("length", *FEATURES))


def ship_weights(spark: SparkSession, model_dir: Path, sha256: str) -> str:
    """Sends the model's weights to all executors, once each; returns their name among Spark's files.

    The name is that of the content: Spark refuses a second file of the same name in one application.
    """
    name = f"{sha256[:32]}.safetensors"
    # Spark's own folder: there as long as the application, which may start new executors at any time.
    copy = Path(SparkFiles.getRootDirectory()) / "trailvec" / name
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(model_dir / WEIGHTS, copy)
        spark.sparkContext.addFile(str(copy))
    return name


def run(runtime: Runtime) -> None:
    model_dir = runtime.model_dir()
    spec = ModelSpec.model_validate(read_about(model_dir)["spec"])
    rows = runtime.read(SEQUENCES).where("split = 'score'")
    users = (
        encode_sequences(rows, model_dir, runtime.config.score.batch_size)
        .withColumn("history_length", F.least("length", F.lit(spec.history_length)))
        .withColumn("model_version", F.lit(model_dir.name))
    )
    runtime.write(USER_EMBEDDINGS, users)


STAGE = Stage(
    "score_users",
    "write the vector of every user",
    run,
    reads=(SEQUENCES,),
    writes=(USER_EMBEDDINGS,),
    settings=(),  # score.batch_size changes the speed, not the vectors
    inputs=lambda runtime: {"model_version": runtime.model_dir().name},
)


def main() -> None:
    stage_main("score_users")


if __name__ == "__main__":
    main()
