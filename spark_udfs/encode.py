"""Vectors of users and items inside Spark's Python workers. The model is loaded once per worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles
from pyspark.sql import Column, DataFrame
from pyspark.sql.pandas.functions import pandas_udf

from training.batches import FEATURES, pad
from training.checkpoint import ItemVectors, load_model
from training.config import ModelSpec

if TYPE_CHECKING:
    from training.model import SequenceModel


def encoder(spec: ModelSpec, weights: str, batch_size: int) -> Callable[..., Column]:
    """The UDF (length, *FEATURES) → array<float>: the state of the model at a row's last action.

    Args:
        weights: name of the model's weights among Spark's files.
        batch_size: rows in one forward pass.
    """

    def encode(batches: Iterator[tuple[pd.Series[Any], ...]]) -> Iterator[pd.Series[Any]]:
        model = _worker_model(SparkFiles.get(weights), spec.model_dump_json())
        for lengths, *features in batches:
            values = [np.concatenate(column.to_numpy()) for column in features]
            yield pd.Series(list(encode_rows(model, lengths.to_numpy(np.int64), values, batch_size)))

    # The annotations are postponed in this file and Spark wants them as types.
    encode.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}  # type: ignore[type-arg]
    return cast(Callable[..., Column], pandas_udf(encode, "array<float>"))  # type: ignore[call-overload]


def as_lists(vectors: npt.NDArray[np.float32]) -> pa.ListArray:
    """Rows of a matrix, float32 [n, width], as Arrow lists, without a Python object for any of them."""
    count, width = vectors.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))


def encode_rows(
    model: SequenceModel, lengths: npt.NDArray[np.int64], values: list[npt.NDArray[np.int32]], batch_size: int
) -> npt.NDArray[np.float32]:
    """Vectors of rows of unequal length, float32 [rows, width], in the rows' order.

    Args:
        lengths: actions of each row, at least 1, [rows].
        values: for each of FEATURES the values of all rows, one row after the other, [sum(lengths)].
        batch_size: rows in one forward pass; rows of like length go together, so that little is padding.
    """
    import torch  # noqa: PLC0415 - only workers need it

    history = model.spec.history_length
    matrices = [torch.from_numpy(pad(column, lengths, history)).long() for column in values]
    kept = np.minimum(lengths, history)
    order = np.argsort(kept, kind="stable")
    vectors = np.empty((len(lengths), model.spec.width), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = kept[rows[-1]]
            batch = {name: matrix[rows, :longest] for name, matrix in zip(FEATURES, matrices, strict=True)}
            vectors[rows] = model.encode(batch).numpy()
    return vectors


def embed_items(items: DataFrame, weights: str) -> DataFrame:
    """The vectors of items, without those of which the model knows nothing.

    Args:
        items: item_id, item_index, and the item's numbers for each attribute of the model, in its order.
        weights: name of the model's weights among Spark's files.

    Returns:
        item_id, item_index, is_cold boolean, vector array<float>.
    """

    def embed(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        table = ItemVectors(Path(SparkFiles.get(weights)))
        for batch in batches:
            index, *attributes = (column.to_numpy().astype(np.int64) for column in batch.columns[1:])
            vectors, cold = table.of(index, attributes)
            said = np.flatnonzero(~cold | vectors.any(axis=1))
            yield pa.RecordBatch.from_arrays(
                [
                    *(column.take(pa.array(said)) for column in batch.columns[:2]),
                    pa.array(cold[said]),
                    as_lists(vectors[said]),
                ],
                ["item_id", "item_index", "is_cold", "vector"],
            )

    return items.mapInArrow(embed, "item_id string, item_index int, is_cold boolean, vector array<float>")


@cache
def _worker_model(weights: str, spec: str) -> SequenceModel:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)  # Spark already runs one worker per core
    return load_model(Path(weights), ModelSpec.model_validate_json(spec))
