"""Vectors of users and items in Spark's Python workers. The model is loaded once per worker, and its weights are
memory-mapped: a machine's workers share one copy, and only the pages that they read are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark import Accumulator, SparkFiles
from pyspark.accumulators import AccumulatorParam
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BooleanType, FloatType, IntegerType, StructType

from spark_udfs.arrow import as_lists
from training.arrays import Bool, Float32, Int32, Int64
from training.batches import FEATURES
from training.checkpoint import ItemVectors, load_model
from training.config import ModelSpec

if TYPE_CHECKING:
    from training.model import SequenceModel

# Counted by the workers while they encode, in this order: rows; cold rows; actions read; cells of the item matrices.
Counts = Accumulator[list[int]]


class Summed(AccumulatorParam[list[int]]):
    """Lists of numbers, summed elementwise."""

    def zero(self, value: list[int]) -> list[int]:
        return [0] * len(value)

    def addInPlace(self, value1: list[int], value2: list[int]) -> list[int]:
        return [a + b for a, b in zip(value1, value2, strict=True)]


def encode_users(
    rows: DataFrame,
    keep: Sequence[str],
    *,
    spec: ModelSpec,
    weights: str,
    batch_size: int,
    rotation: Float32 | None,
    counts: Counts | None,
) -> DataFrame:
    """The columns `keep` of rows of `sequences`, plus history_length int, is_cold boolean, vector array<float>.

    The vector is the model's state at the row's last action. Of a row longer than `spec.history_length`, the newest
    actions are read. A row is cold if the model knows none of the items that it reads; its vector then reflects only
    the actions' context.

    Args:
        weights: name of the model's weights among the files that Spark distributes.
        batch_size: rows in one forward pass.
        rotation: [width, width], applied to the states (`trailvec align`); None: no rotation.
    """
    keep_count = len(keep)

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        model = _worker_model(SparkFiles.get(weights), spec.model_dump_json())
        for batch in batches:
            lengths = batch.column(keep_count).to_numpy().astype(np.int64)
            values = [column.flatten().to_numpy() for column in batch.columns[keep_count + 1 :]]
            read_lengths = np.minimum(lengths, spec.history_length)
            vectors, cold, places = encode_rows(model, lengths, values, batch_size)
            if counts is not None:
                counts.add([len(read_lengths), int(cold.sum()), int(read_lengths.sum()), places])
            computed = [pa.array(read_lengths.astype(np.int32)), pa.array(cold), as_lists(rotated(vectors, rotation))]
            yield pa.RecordBatch.from_arrays([*batch.columns[:keep_count], *computed], schema.names)

    # Renamed, because a column of `keep` may be among the inputs too.
    frame = rows.select(*keep, *[F.col(name).alias(f"read_{name}") for name in ("length", *FEATURES)])
    schema = StructType(frame.schema.fields[:keep_count])
    for name, kind in (("history_length", IntegerType()), ("is_cold", BooleanType())):
        schema = schema.add(name, kind)
    schema = schema.add("vector", ArrayType(FloatType()))
    return frame.mapInArrow(encode, schema)


def rotated(vectors: Float32, rotation: Float32 | None) -> Float32:
    return vectors if rotation is None else vectors @ rotation


def encode_rows(
    model: LoadedModel, lengths: Int64, values: Sequence[Int32], batch_size: int
) -> tuple[Float32, Bool, int]:
    """Vectors of ragged rows, float32 [rows, width], and which rows are cold, bool [rows], both in the rows' order; and
    the number of cells of their item matrices, padding included.

    Args:
        lengths: actions of each row, at least 1, [rows].
        values: for each of FEATURES the values of all rows, concatenated, [sum(lengths)].
        batch_size: rows in one forward pass; rows of similar length are batched together to save padding.
    """
    import torch  # noqa: PLC0415 - only workers need it

    vectors = np.empty((len(lengths), model.spec.width), np.float32)
    cold = np.empty(len(lengths), np.bool_)
    places = 0
    with torch.inference_mode():
        for rows, batch in by_length(lengths, values, model.spec.history_length, batch_size):
            vectors[rows] = model.encode({name: torch.from_numpy(matrix) for name, matrix in batch.items()}).numpy()
            cold[rows] = ~model.knows[np.minimum(batch["item_index"], model.spec.items)].any(axis=1)
            places += batch["item_index"].size
    return vectors, cold, places


def by_length(
    lengths: Int64, values: Sequence[Int32], history: int, batch_size: int
) -> Iterator[tuple[Int64, dict[str, Int32]]]:
    """The rows in batches, shortest first: their numbers [batch], and for each of FEATURES int32 [batch, longest].

    Args:
        history: a longer row keeps its `history` newest actions.
    """
    kept, ends = np.minimum(lengths, history), np.cumsum(lengths)
    order = np.argsort(kept, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        columns = np.arange(kept[rows[-1]])
        inside = columns < kept[rows, None]
        places = np.where(inside, (ends - kept)[rows, None] + columns, 0)
        yield rows, {name: np.where(inside, of[places], 0) for name, of in zip(FEATURES, values, strict=True)}


def embed_items(items: DataFrame, weights: str, rotation: Float32 | None) -> DataFrame:
    """The vectors of items, except those of which the model knows neither the item nor any attribute.

    Args:
        items: item_id, item_index, and the item's number today for each attribute of the model, in the model's order.
        weights: name of the model's weights among the files that Spark distributes.
        rotation: as in `encode_users`.

    Returns:
        item_id, item_index, is_cold boolean, vector array<float>.
    """

    def embed(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        table = ItemVectors(Path(SparkFiles.get(weights)))
        for batch in batches:
            index, *attributes = (column.to_numpy().astype(np.int64) for column in batch.columns[1:])
            vectors, cold = table.of(index, attributes)
            rows = np.flatnonzero(~cold | vectors.any(axis=1))
            yield pa.RecordBatch.from_arrays(
                [
                    *(column.take(pa.array(rows)) for column in batch.columns[:2]),
                    pa.array(cold[rows]),
                    as_lists(rotated(vectors[rows], rotation)),
                ],
                ["item_id", "item_index", "is_cold", "vector"],
            )

    return items.mapInArrow(embed, "item_id string, item_index int, is_cold boolean, vector array<float>")


class LoadedModel:
    """A model as a worker holds it.

    Attributes:
        encode: the result of training.scoring.fast_encoder.
        knows: whether the model knows an item, bool [items + 1]; the last entry stands for all newer items.
    """

    def __init__(self, model: SequenceModel) -> None:
        from training.scoring import fast_encoder  # noqa: PLC0415

        self.spec = model.spec
        self.encode = fast_encoder(model)
        self.knows = np.append(model.item_counts.numpy() > 0, False)


@cache
def _worker_model(weights: str, spec: str) -> LoadedModel:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)  # Spark already runs one worker per core
    return LoadedModel(load_model(Path(weights), ModelSpec.model_validate_json(spec)))
