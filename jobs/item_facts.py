"""Facts about the items for training and the stages after it, in arrays indexed by item_index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.build_sequences import price_bucket
from jobs.build_vocabulary import category_value, numbers_of
from training.arrays import Int32, Int64
from training.batches import UNKNOWN
from training.config import ITEM_ATTRIBUTES


def item_counts(items: DataFrame, min_count: int) -> Int64:
    """The train_count of each item, [largest item_index + 1]; 0 for items outside the model's vocabulary. The model
    stores it."""
    rows = items.select("item_index", "train_count").toPandas()
    counts = np.zeros(_size(rows), np.int64)
    counts[rows["item_index"]] = rows["train_count"].where(rows["train_count"] >= min_count, 0)
    return counts


def item_attributes(items: DataFrame, context_values: DataFrame) -> DataFrame:
    """item_id, item_index and the item's number for each of ITEM_ATTRIBUTES; 0 where it is unknown."""
    numbered = items.withColumn("category", category_value())
    for kind in ("category", "vertical"):
        numbered = numbered.join(numbers_of(context_values, kind), kind, "left")
    number_of = {
        "category": F.coalesce("category_index", F.lit(0)),
        "vertical": F.coalesce("vertical_index", F.lit(0)),
        "price": F.when(F.col("unit_price").isNull(), 0).otherwise(price_bucket(F.col("unit_price"))),
    }
    numbers = [number_of[name].cast("int").alias(name) for name in ITEM_ATTRIBUTES]
    return numbered.select("item_id", "item_index", *numbers)


def attribute_matrix(attributes: DataFrame, names: Sequence[str], items: int) -> Int32:
    """int32 [len(names), items] of `item_attributes` rows; items without a row have zeros."""
    rows = attributes.select("item_index", *names).toPandas()
    matrix = np.zeros((len(names), items), np.int32)
    for place, name in enumerate(names):
        matrix[place, rows["item_index"]] = rows[name]
    return matrix


def item_verticals(items: DataFrame) -> tuple[Int64, list[str]]:
    """Each item's vertical, int64 [largest item_index + 1], as an index into the returned list of names; -1: none."""
    rows = items.select("item_index", "vertical").toPandas()
    codes, names = pd.factorize(rows["vertical"], sort=True)
    places = np.full(_size(rows), -1, np.int64)
    places[rows["item_index"]] = codes
    return places, [str(name) for name in names]


def _size(rows: pd.DataFrame) -> int:
    """Length of an array indexed by item_index; UNKNOWN + 1 if there are no items."""
    return int(rows["item_index"].max() if len(rows) else UNKNOWN) + 1
