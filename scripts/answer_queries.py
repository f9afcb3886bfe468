"""Writes docs/queries.md: the queries of docs/queries.sql with their answers.

    python scripts/answer_queries.py --conf conf/local.toml

Run the whole pipeline first (`make demo`): the answers are those of the warehouse that the configuration names. A query
begins with a line `-- its title` and ends with a semicolon. All run in one Spark session, in the order of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.cli import guarded
from jobs.config import load_config
from jobs.model_folders import model_folder
from jobs.runtime import Runtime
from jobs.sql import prepare

DOCS = Path(__file__).parent.parent / "docs"

_HEAD = """# Ten queries

Made by `scripts/answer_queries.py` from `queries.sql`; the answers are those of Complete Journey (`make demo`), with
model {model} of {epochs} epoch(s). Another training gives other vectors, so other neighbours.
`trailvec sql --conf conf/local.toml "…"` and any JDBC client of `trailvec serve_sql` run them.

The first query that calls a vector function waits for a Python worker to start; later ones find it running.
"""


def queries() -> list[tuple[str, str]]:
    """(title, text) of each query of the file."""
    found = []
    for part in (DOCS / "queries.sql").read_text(encoding="utf-8").split(";\n"):
        if part.strip():
            title, _, text = part.strip().partition("\n")
            found.append((title.removeprefix("-- "), text))
    return found


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d")
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", required=True, metavar="FILE")
    parser.add_argument("--set", metavar="a.b=c", action="append", default=[])
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args()
    runtime = Runtime(load_config(arguments.conf, arguments.set))
    folder = model_folder(runtime)
    trained = json.loads((folder / "model.json").read_text())["provenance"]["config"]["train"]
    parts = [_HEAD.format(model=folder.name, epochs=trained["epochs"])]
    prepare(runtime)
    for number, (title, text) in enumerate(queries(), 1):
        answer = runtime.spark.sql(text)
        lines = [f"## {number}. {title}", "", "```sql", text, "```", ""]
        lines += [f"| {' | '.join(answer.columns)} |", f"|{'---|' * len(answer.columns)}"]
        lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in answer.collect()]
        parts.append("\n".join([*lines, ""]))
        print(parts[-1], flush=True)
    (DOCS / "queries.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(guarded(main, debug="--debug" in sys.argv))
