"""Code that runs in executors' Python or in SQL: pure Arrow/numpy functions with thin UDFs around them."""

import gc
import sys
from pathlib import PurePath


def forget_zips() -> None:
    """Removes Spark's own zips from a worker's sys.path; their modules are loaded already.

    Before each task a worker invalidates Python's import caches, and Python 3.11 then rereads the directory of every
    zip at once (https://github.com/python/cpython/issues/103200): Spark's two zips and its core jar several times each,
    0.06 s of CPU in all. Forty empty tasks on two cores take 1.4 s instead of 2.7 s. (A later Spark invalidates less
    often: SPARK-54744.)
    """
    own = ("pyspark", "py4j-", "spark-core")
    zips = tuple(p for p in sys.path if p.endswith((".zip", ".jar")) and PurePath(p).name.startswith(own))
    sys.path[:] = [place for place in sys.path if place not in zips]
    for place in [place for place in sys.path_importer_cache if place.startswith(zips)]:
        del sys.path_importer_cache[place]


if {"pyspark.worker", "py4j"} <= sys.modules.keys():
    forget_zips()
    gc.freeze()  # a worker collects garbage after each task: spare it a scan of all loaded modules
