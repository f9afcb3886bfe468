"""SQL table functions: the items and the users nearest to one user, within one model.

    SELECT * FROM nearest_items('1001', 10)      rank, item_id, score   dot product: the model's own score
    SELECT * FROM nearest_users('1001', 10)      rank, user_id, score   cosine, never the user itself

    SELECT u.user_id, n.item_id FROM seeds AS u, LATERAL nearest_items(u.user_id, 5) AS n      for a few users

The number defaults to 10. Exact, with the scores and tie-breaking of find_neighbours, but whatever neighbours.metrics
says. A user without a vector gives no rows; to keep such users, write seeds AS u LEFT JOIN LATERAL
nearest_items(u.user_id, 5) AS n ON true (without ON true they are lost). Both sides use the model `model.version`, or,
if that is not set, the one that is current when a task starts: a query of several tasks (many users) may mix two
models during a switch, while current_neighbours never does.

Spark 3.5 runs such a function row by row in a Python worker, which has no Spark session. The function lists the active
files of the Delta tables with delta-rs and reads them with pyarrow, block by block, so its memory is bounded however
large the tables are; up to 128 MiB of vectors per table are cached for a task's next rows. Each call scans every
candidate: for many users, read the table neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pyspark.sql import SparkSession
from pyspark.sql.functions import udtf

from jobs.errors import TrailvecError
from spark_udfs.arrow import matrix_of
from spark_udfs.topk import Ids, Metric, keep_best, top_k
from training.arrays import Float32
from training.urls import file_of_table

_BLOCK_ROWS = 1 << 15  # 8 MiB of vectors at width 64
_KEPT_BYTES = 128 << 20
Block = tuple[Ids, Float32]


class VectorTable:
    """The vectors of one model, in blocks sorted by id. A small table is read once, a large one at each scan."""

    def __init__(self, path: Path, id_column: str, version: str) -> None:
        """Raises TrailvecError: the table does not exist, has no vector of the model, or has deletion vectors, which
        delta-rs and pyarrow would ignore."""
        if not deltalake.DeltaTable.is_deltatable(str(path)):
            raise TrailvecError(
                f"table {path.name} does not exist under {path.parent.parent}: run `trailvec run` first"
            )
        table = deltalake.DeltaTable(str(path))
        if "deletionVectors" in (table.protocol().reader_features or []):
            raise TrailvecError(f"table {path.name} has deletion vectors: read the table neighbours instead")
        files = [file_of_table(uri) for uri in table.file_uris([("model_version", "=", version)])]
        if not files:
            raise TrailvecError(f"table {path.name} has no vector of model {version}: run `trailvec run` first")
        self._dataset = ds.dataset(files, format="parquet")
        self._id_column = id_column
        self._cached: list[Block] | None = None

    def blocks(self) -> Iterator[Block]:
        if self._cached is not None:
            yield from self._cached
            return
        cached: list[Block] = []
        size = 0
        columns = [self._id_column, "vector"]
        # Minimal read-ahead: by default pyarrow would hold sixteen blocks of each of four files.
        for batch in self._dataset.to_batches(
            columns=columns, batch_size=_BLOCK_ROWS, batch_readahead=1, fragment_readahead=1
        ):
            if batch.num_rows:
                block = _block(batch)
                size += block[0].nbytes + block[1].nbytes
                cached = [*cached, block] if size <= _KEPT_BYTES else []
                yield block
        if size <= _KEPT_BYTES:
            self._cached = cached

    def vector(self, row_id: str) -> Float32 | None:
        """The vector of one id, as [1, length]."""
        for ids, vectors in self.blocks():
            row = int(np.searchsorted(ids, row_id))
            if row < len(ids) and ids[row] == row_id:
                return vectors[row : row + 1]
        return None


def _block(batch: pa.RecordBatch) -> Block:
    ids = batch.column(0).to_numpy(zero_copy_only=False).astype(np.str_)
    order = np.argsort(ids)
    return ids[order], matrix_of(batch.column(1))[order]


def nearest(
    user_id: str, k: int, users: VectorTable, candidates: VectorTable, metric: Metric
) -> Iterator[tuple[int, str, float]]:
    """(rank, id, score) of the k nearest candidates; by cosine, never the user itself. Empty if the user has no vector,
    or by cosine a zero one."""
    query = users.vector(user_id)
    if query is None or (metric == "cosine" and not query.any()):
        return
    ids, scores = np.empty(0, np.str_), np.empty(0, np.float32)
    for block_ids, vectors in candidates.blocks():
        some = block_ids, vectors
        if metric == "cosine":
            directed = vectors.any(axis=1) & (block_ids != user_id)
            some = block_ids[directed], vectors[directed]
        _, rows, found_scores = top_k(query, some[1], k, metric)
        ids, scores = np.concatenate([ids, some[0][rows]]), np.concatenate([scores, found_scores])
        _, ids, scores = keep_best(np.zeros(len(ids), np.int64), ids, scores, k)
    for rank, (found_id, score) in enumerate(zip(ids, scores, strict=True), 1):
        yield rank, str(found_id), float(score)


def current_model(tables: Path) -> str:
    """The current model, of which every user has a vector, from the table current_model.

    Raises:
        TrailvecError: there is none yet.
    """
    path = tables / "current_model"
    uris = deltalake.DeltaTable(str(path)).file_uris() if deltalake.DeltaTable.is_deltatable(str(path)) else []
    files = [file_of_table(uri) for uri in uris]
    versions = ds.dataset(files, format="parquet").to_table()["model_version"].to_pylist() if files else []
    if not versions:
        raise TrailvecError(f"no model has a vector for every user under {tables.parent}: run `trailvec run` first")
    return str(versions[0])


def _names_a_user(value: Any) -> bool:
    """Whether SQL passed a string or a whole number (a DECIMAL if it is beyond BIGINT)."""
    if isinstance(value, Decimal):
        return value.as_tuple().exponent == 0
    return type(value) in (str, int)


def _table_function(name: str, root: Path, version: str | None) -> Any:
    kind, metric = TABLE_FUNCTIONS[name]

    class Nearest:
        def __init__(self) -> None:
            self._tables: tuple[VectorTable, VectorTable] | None = None

        def eval(self, user_id: str | None, k: int | None = 10) -> Iterator[tuple[int, str, float]]:
            if type(k) is not int or k < 1:  # SQL may pass any type
                shown = "NULL" if k is None else repr(k) if isinstance(k, str) else k
                raise TrailvecError(f"{name}: k is {shown}: write a whole number of at least 1")
            if user_id is None:
                return
            if not _names_a_user(user_id):
                shown = f"{user_id} ({type(user_id).__name__})"
                raise TrailvecError(
                    f"{name}: user_id is {shown}: write a string or a whole number, as in user_embeddings"
                )
            if self._tables is None:
                model = version or current_model(root / "tables")
                users = VectorTable(root / "tables" / "user_embeddings", "user_id", model)
                same = kind == "user"
                others = users if same else VectorTable(root / "tables" / "item_embeddings", "item_id", model)
                self._tables = users, others
            yield from nearest(str(user_id), k, *self._tables, metric)

    Nearest.eval.__qualname__ = name  # Python's error about a missing argument shows it
    return udtf(Nearest, returnType=f"rank int, {kind}_id string, score float")


TABLE_FUNCTIONS: dict[str, tuple[str, Metric]] = {"nearest_items": ("item", "dot"), "nearest_users": ("user", "cosine")}


def register(spark: SparkSession, root: Path, version: str | None) -> None:
    """Registers the table functions for SQL in this session.

    Args:
        root: the folder that holds tables and models; each worker must see it.
        version: the model; None: the one that is current when a task starts.
    """
    for name in TABLE_FUNCTIONS:
        spark.udtf.register(name, _table_function(name, root, version))
