"""How a model's weights come to the executors, without Spark."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from pyspark import SparkFiles

from jobs import models


def test_half_copied_weights_are_not_taken_for_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(SparkFiles, "getRootDirectory", lambda: str(tmp_path))
    spark = Mock()

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:3])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="no space"):
            models._ship_weights(spark, tmp_path, "ab" * 32)
    for _ in range(2):  # once is enough
        name = models._ship_weights(spark, tmp_path, "ab" * 32)
    (shipped,) = (call.args[0] for call in spark.sparkContext.addFile.call_args_list)
    assert (Path(shipped).name, Path(shipped).read_bytes()) == (name, b"weights")
