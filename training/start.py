"""Initial item vectors: item co-occurrence, factorised by a truncated SVD before the first step.

From random vectors, a transformer over a catalogue of this size needs very many passes to learn which items go
together. The SVD of the row-by-item matrix takes a second, and the sum of a history's vectors is then already a fair
guess of what comes next (Sarwar et al., 2000, for the factors; measured in docs/what-did-not-work.md).
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pds
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from training.arrays import Bool, Float32
from training.stores import parquet_files

MAX_ROWS = 100_000  # of sequences; with MAX_ITEMS this bounds memory, whatever the log's size
MAX_ITEMS = 200_000  # 200 MB of factors at width 64
_NORM = 0.1  # root mean square of the vectors' norms: about that of the random ones at width 64
_LONGEST = 4 * _NORM  # without a cap, the first epochs would be spent on shortening popular items' vectors


def item_factors(files: list[str], known: Bool, width: int, seed: int, max_rows: int = MAX_ROWS) -> Float32:
    """The right singular vectors of log(1 + count) of the first `max_rows` rows by the known items.

    Args:
        files: URLs of the train split's files, whose row order is unrelated to users.
        known: whether the model knows an item, [items].

    Returns:
        float32 [items, width]; zeros for items in none of the rows, and in the last coordinates if there are too few
        rows or items for rank `width`.
    """
    system, paths = parquet_files(files)
    lists = pds.dataset(paths, filesystem=system).head(max_rows, columns=["item_index"])["item_index"].combine_chunks()
    rows = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
    items = lists.flatten().to_numpy()
    inside = (items < len(known)) & known[np.minimum(items, len(known) - 1)]
    counts = sp.csr_matrix((np.ones(inside.sum()), (rows[inside], items[inside])), shape=(len(lists), len(known)))
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data)

    factors = np.zeros((len(known), width), np.float32)
    smaller = min(counts.shape)
    rank = min(width, smaller - 1)
    if rank < 1 or counts.nnz == 0:
        return factors
    _, values, right = svds(counts, k=rank, v0=np.random.default_rng(seed).standard_normal(smaller))
    right[values <= 1e-6 * values.max()] = 0  # of a matrix of lower rank: directions of no meaning
    factors[:, :rank] = right.T
    lengths = np.linalg.norm(factors, axis=1, keepdims=True)
    scale = _NORM / np.sqrt(np.mean(lengths[known] ** 2))
    factors *= np.minimum(scale, _LONGEST / np.maximum(lengths, 1e-12))
    return factors
