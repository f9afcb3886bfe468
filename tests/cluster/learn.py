"""Training, scoring and an export in one application. Submitted by test_yarn.py."""

from __future__ import annotations

import sys

from jobs.cli import guarded, run_stages
from jobs.config import load_config
from jobs.pipeline import STAGES
from jobs.runtime import Runtime

NAMES = ("train", "align", "score_users", "export_segments")

if __name__ == "__main__":
    conf = sys.argv[1].removeprefix("--conf=")
    stages = [stage for stage in STAGES if stage.name in NAMES]
    sys.exit(guarded(lambda: run_stages(Runtime(load_config(conf)), stages)))
