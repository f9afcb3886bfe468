"""Users' vectors inside Spark: an iterator pandas UDF around the model. The model is loaded once per Python worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark import SparkFiles
from pyspark.sql import Column
from pyspark.sql.pandas.functions import pandas_udf

from training.batches import FEATURES, pad
from training.checkpoint import load_model
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


@cache
def _worker_model(weights: str, spec: str) -> SequenceModel:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)  # Spark already runs one worker per core
    return load_model(Path(weights), ModelSpec.model_validate_json(spec))
