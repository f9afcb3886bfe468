"""Profiles in Spark's Python workers: lists of numbers and values in, vectors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from pyspark.sql import DataFrame

from spark_udfs.arrow import as_lists, matrix_of
from training.profile import AT_ONCE, Basis

KINDS = ("items", "categories", "statistics")


def counts_of(numbers: Any, values: Any) -> sp.csr_matrix:
    """Arrow lists of column numbers and of their values, one pair of lists per user → float64 [users, numbers]."""
    offsets = numbers.offsets.to_numpy()
    columns = numbers.values.to_numpy()[offsets[0] : offsets[-1]]
    data = values.flatten().to_numpy().astype(np.float64)
    return sp.csr_matrix((data, columns, offsets - offsets[0]), (len(numbers), columns.max(initial=0) + 1))


def profiles(rows: DataFrame, basis: Basis) -> DataFrame:
    """jobs.profile_users.profile_rows → user_id, vector array<float>."""
    shared = rows.sparkSession.sparkContext.broadcast(basis)

    def make(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for part in (batch.slice(start, AT_ONCE) for batch in batches for start in range(0, len(batch), AT_ONCE)):
            users, states, *lists = part.columns
            pairs = zip(KINDS, lists[::2], lists[1::2], strict=True)
            vectors = shared.value.profiles(matrix_of(states), {kind: counts_of(n, v) for kind, n, v in pairs})
            yield pa.RecordBatch.from_arrays([users, as_lists(vectors)], ["user_id", "vector"])

    return rows.mapInArrow(make, "user_id string, vector array<float>")
