"""Vector functions as pandas UDFs and as native expressions: python scripts/bench/vectors.py [--quick]

Over a Parquet file of pairs of vectors of width 64, on 2 cores, in turns, medians, minus the scan of the same columns:

  inner_product, cosine   the pandas UDF; aggregate(zip_with(...)) of Spark's higher-order functions
  sum                     the pandas UDF; collect_list, then one aggregate() over it
  top_k                   for 64 groups: slice(sort_array(collect_list(...))); row_number() <= k (Spark prunes early)

First, both versions of each function must give the same numbers. The last line is one JSON object: seconds of each, and
<function>_native_to_pandas (under 1: native is faster).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import in_turns, last_line, options, session
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_udfs import vectors

LENGTH = 64
K = 10


def pairs(spark: SparkSession, count: int, path: Path) -> DataFrame:
    def vector(seed: int) -> Column:
        return F.array(*[F.randn(seed + n).cast("float") for n in range(LENGTH)])

    if not path.exists():
        rows = spark.range(0, count, 1, 4).select("id", vector(0).alias("a"), vector(LENGTH).alias("b"))
        rows.write.parquet(str(path))
    return spark.read.parquet(str(path))


def dot(a: str, b: str) -> str:
    product = f"zip_with({a}, {b}, (x, y) -> CAST(x AS DOUBLE) * y)"
    total = f"aggregate({product}, 0D, (s, x) -> s + x)"
    return f"CASE WHEN size({a}) = size({b}) THEN {total} ELSE CAST(raise_error('unequal lengths') AS DOUBLE) END"


SUMMED = f"aggregate(collect_list(a), array_repeat(0D, {LENGTH}), (s, v) -> zip_with(s, v, (x, y) -> x + y))"
WAYS = {
    "scan": "SELECT sum(a[0] + b[0]) FROM pairs",
    "inner_product_pandas": "SELECT sum(vector_inner_product(a, b)) FROM pairs",
    "inner_product_native": f"SELECT sum(CAST({dot('a', 'b')} AS FLOAT)) FROM pairs",
    "cosine_pandas": "SELECT sum(vector_cosine_similarity(a, b)) FROM pairs",
    "cosine_native": f"""
        SELECT sum(CAST(CASE WHEN l > 0 THEN p / l END AS FLOAT))
        FROM (SELECT {dot("a", "b")} AS p, sqrt({dot("a", "a")}) * sqrt({dot("b", "b")}) AS l FROM pairs)""",
    "sum_pandas": "SELECT vector_sum(a) FROM pairs GROUP BY id % 64",
    "sum_native": f"SELECT {SUMMED} FROM pairs GROUP BY id % 64",
    "top_k_collected": f"""
        SELECT slice(sort_array(collect_list(struct(a[0] AS score, id)), false), 1, {K}) FROM pairs GROUP BY id % 64""",
    "top_k_ranked": f"""
        SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY id % 64 ORDER BY a[0] DESC, id) AS rank FROM pairs)
        WHERE rank <= {K}""",
}


def compare(spark: SparkSession) -> None:
    for name in ("inner_product", "cosine", "sum"):
        one, other = (
            np.array(
                sorted([*row] if np.isscalar(row[0]) else row[0] for row in spark.sql(WAYS[f"{name}_{way}"]).collect())
            )
            for way in ("pandas", "native")
        )
        assert np.allclose(one, other, rtol=1e-4, atol=1e-3), f"{name} differs: {one} {other}"


def main() -> None:
    parser = options(__doc__, quick="20,000 pairs", folder="the pairs")
    parser.add_argument("--pairs", type=float, help="number of pairs (default: 300,000)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="rounds, after two warm-ups, of which the medians are reported (default: 5)",
    )
    arguments = parser.parse_args()
    count = int(arguments.pairs or (20_000 if arguments.quick else 300_000))

    spark = session(quick=False)
    vectors.register(spark)
    pairs(spark, count, arguments.folder.absolute() / f"pairs-{count}").createOrReplaceTempView("pairs")
    compare(spark)

    def run(text: str) -> Callable[[], None]:
        return lambda: spark.sql(text).write.format("noop").mode("overwrite").save()

    times, _ = in_turns({name: run(text) for name, text in WAYS.items()}, arguments.rounds, warm=2)
    spark.stop()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    scan = medians.pop("scan")
    above = {name: max(0.001, seconds - scan) for name, seconds in medians.items()}
    result: dict[str, Any] = {"pairs": count, "rounds": arguments.rounds, "scan_s": scan}
    for name in ("inner_product", "cosine", "sum"):
        result[f"{name}_native_to_pandas"] = above[f"{name}_native"] / above[f"{name}_pandas"]
    last_line(result | {f"{name}_s": seconds for name, seconds in medians.items()})


if __name__ == "__main__":
    main()
