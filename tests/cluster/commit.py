"""Commits rows to a Delta table, one at a time, once a file gives the start signal. Started by test_object_store.py.

python commit.py CONF TABLE FIRST LAST FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from delta.exceptions import ConcurrentAppendException, MetadataChangedException, ProtocolChangedException

from jobs.config import load_config
from jobs.spark_session import start_spark

# A large commit takes a while to write, which exposes a writer that only checks for the file before writing it.
LONG = "x" * 3_000_000

if __name__ == "__main__":
    conf, table, first, last, folder = sys.argv[1:]
    spark = start_spark(load_config(conf))
    # The other writer may be creating the table at the same moment: Delta leaves the retry to the caller.
    conflicts = (ConcurrentAppendException, MetadataChangedException, ProtocolChangedException)
    (Path(folder) / f"ready-{first}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.01)
    for number in range(int(first), int(last)):
        while True:
            try:
                rows = spark.range(number, number + 1, numPartitions=1).write.format("delta").mode("append")
                rows.option("userMetadata", LONG).save(table)
                break
            except conflicts:
                continue
