from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from tests.cluster.road import run_here


@pytest.fixture(scope="session")
def expected(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same stages, run locally: to be read only. Made once, although two processes may run these tests."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "expected"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            shutil.rmtree(root, ignore_errors=True)  # what a process that failed has left
            run_here(spark, root)
            (root / "done").touch()
    return root
