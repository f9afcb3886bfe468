"""An erasure, upkeep and the proof, wherever the tables are stored, then a command on a bucket that does not exist.
Started by test_object_store.py.

python forget.py CONF IDS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jobs.cli import main
from jobs.config import load_config
from jobs.erase_users import erase, finish
from jobs.maintain_tables import maintain
from jobs.runtime import Runtime
from tests.conftest import expired


def forget(runtime: Runtime, ids: Path) -> dict[str, Any]:
    """The reports of an erasure, of upkeep without a retention, and of the proof."""
    rows = erase(runtime, str(ids), requested_by="tests").rows_out
    early = finish(runtime).rows_out
    upkeep = {entry.pop("table"): entry for entry in maintain(expired(runtime))}
    return {"rows": rows, "early": early, "upkeep": upkeep, "finished": finish(runtime).rows_out}


if __name__ == "__main__":
    print(json.dumps(forget(Runtime(load_config(sys.argv[1])), Path(sys.argv[2]))), flush=True)
    main(["tables", "--conf", sys.argv[1], "--set", 'storage.root="s3a://nowhere/trailvec"'])
