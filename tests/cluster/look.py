"""Prints what a job sees on the cluster as one line of JSON, then fails in a stage. Submitted by test_yarn.py."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy

import jobs
from jobs.cli import main
from jobs.config import load_config
from jobs.segment_files import export_key
from jobs.spark_session import start_spark


def look(_: object = None) -> Iterator[dict[str, Any]]:
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if "/" in line}
    yield {
        "folder": os.getcwd(),
        "prefix": sys.prefix,
        "modules": [jobs.__file__, numpy.__file__],
        "path": sys.path,
        "files": sorted(files),
        "temporary": tempfile.gettempdir(),
    }


if __name__ == "__main__":
    conf = sys.argv[1].removeprefix("--conf=")
    spark = start_spark(load_config(conf))
    worker = spark.sparkContext.parallelize([0], 1).mapPartitions(lambda _: look()).collect()[0]
    key = hashlib.sha256(export_key()).hexdigest()
    print(json.dumps({"driver": next(look()), "worker": worker, "key": key}), flush=True)
    main(["train", "--conf", conf])
