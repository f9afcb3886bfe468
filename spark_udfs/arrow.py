"""A column of equal-length vectors as a matrix and back, without a Python object per vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from training.arrays import Float32


def matrix_of(vectors: pa.ListArray) -> npt.NDArray[Any]:
    """The lists as rows, [rows, width]; there must be at least one."""
    return np.asarray(vectors.flatten().to_numpy()).reshape(len(vectors), -1)


def as_lists(vectors: Float32) -> pa.ListArray:
    """Rows of a matrix, float32 [n, width], as Arrow lists.

    Their offsets are evenly spaced; Arrow's own lists of fixed size can't be read by Spark 3.5.
    """
    count, width = vectors.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
