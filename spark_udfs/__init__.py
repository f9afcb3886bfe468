"""What runs inside an executor's Python or inside SQL. Pure Arrow/numpy functions; the UDF around one is two lines."""

import gc
import sys
from pathlib import PurePath


def forget_zips() -> None:
    """Takes Spark's own zips, whose modules a worker has loaded already, off its path.

    Before each task a worker lets Python forget what the path holds, and Python 3.11 then reads the directory of every
    zip at once (https://github.com/python/cpython/issues/103200): several times each of Spark's two, and of its core
    jar, .06 s of a core in all. Forty empty tasks took 2.7 s on two cores, and take 1.4 s. (A later Spark forgets less
    often: SPARK-54744.)
    """
    own = ("pyspark", "py4j-", "spark-core")
    zips = tuple(p for p in sys.path if p.endswith((".zip", ".jar")) and PurePath(p).name.startswith(own))
    sys.path[:] = [place for place in sys.path if place not in zips]
    for place in [place for place in sys.path_importer_cache if place.startswith(zips)]:
        del sys.path_importer_cache[place]


if {"pyspark.worker", "py4j"} <= sys.modules.keys():
    forget_zips()
    gc.freeze()  # after each task a worker looks for garbage: not through all that Python and pandas are made of
