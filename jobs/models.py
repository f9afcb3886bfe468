"""A model's vectors with Spark: ships weights to the executors, encodes rows of `sequences`, looks up items."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession

from jobs.item_facts import item_attributes
from jobs.model_folders import check_numbers
from jobs.runtime import Runtime
from jobs.tables import CONTEXT_VALUES, ITEMS
from spark_udfs.encode import Counts, embed_items, encode_users
from training.arrays import Float32
from training.checkpoint import WEIGHTS, read_about, read_rotation
from training.config import ModelSpec


def encode_sequences(
    runtime: Runtime,
    sequences: DataFrame,
    keep: Sequence[str],
    *,
    model_dir: Path,
    counts: Counts | None = None,
    aligned: bool = True,
) -> DataFrame:
    """The columns `keep` of rows of `sequences` (any split), plus history_length, is_cold and vector: the state at each
    row's last action (spark_udfs.encode.encode_users).

    Args:
        aligned: apply the model's alignment rotation (`trailvec align`).

    Raises:
        TrailvecError: the model in that folder is damaged, or its item numbers are stale (`check_numbers`).
    """
    about = read_about(model_dir)
    check_numbers(runtime, about)
    return encode_users(
        sequences,
        keep,
        spec=ModelSpec.model_validate(about["spec"]),
        weights=_ship_weights(runtime.spark, model_dir, about["weights_sha256"]),
        batch_size=runtime.config.score.batch_size,
        rotation=read_rotation(model_dir) if aligned else None,
        counts=counts,
    )


def item_vectors(runtime: Runtime, model_dir: Path, aligned: bool = True) -> DataFrame:
    """item_id, item_index, is_cold and vector of the items that the model has learnt or knows attributes of.

    Reads the stage's ITEMS and CONTEXT_VALUES.

    Args:
        aligned: as in `encode_sequences`.

    Raises:
        TrailvecError: the model in that folder is damaged, or its item numbers are stale (`check_numbers`).
    """
    about = read_about(model_dir)
    check_numbers(runtime, about)
    names = ModelSpec.model_validate(about["spec"]).attribute_sizes
    rows = item_attributes(runtime.read(ITEMS), runtime.read(CONTEXT_VALUES))
    weights = _ship_weights(runtime.spark, model_dir, about["weights_sha256"])
    rotation = read_rotation(model_dir) if aligned else None
    return embed_items(rows.select("item_id", "item_index", *names), weights, rotation)


def stacked(vectors: pd.Series[Any], width: int = 1) -> Float32:
    """A column of vectors as a matrix, float32 [rows, width]; `width` is only used for a column without rows."""
    return np.stack(list(vectors)).astype(np.float32, copy=False) if len(vectors) else np.empty((0, width), np.float32)


def _ship_weights(spark: SparkSession, model_dir: Path, sha256: str) -> str:
    """Ships the model's weights to all executors, once; returns their name among Spark's files.

    The name is a content hash: Spark refuses a second file of the same name in one application.
    """
    name = f"{sha256[:32]}.safetensors"
    # In Spark's own folder: it lives as long as the application, which may start executors at any time.
    copy = Path(SparkFiles.getRootDirectory()) / "trailvec" / name
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        part = copy.with_suffix(".part")  # a full disk leaves a partial copy, which must not pass for the whole
        shutil.copyfile(model_dir / WEIGHTS, part)
        part.replace(copy)
        spark.sparkContext.addFile(str(copy))
    return name
