"""retire_model: removes an old model's rows from the tables: vectors, profiles, neighbours.

trailvec retire_model VERSION --conf conf/local.toml

One commit per table, dropping whole partitions, so no data file is read. Readers that have already begun keep working
until maintain_tables deletes the files. The current model is refused. The model itself stays in models/VERSION and can
be scored again; its rows in `evaluation` and `probes` stay too.
"""

from __future__ import annotations

from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.model_folders import description
from jobs.runtime import Report, Runtime, Stage
from jobs.score_users import was_scored
from jobs.tables import CURRENT, EVALUATION, PROBES

_STAY = (EVALUATION, PROBES)  # kept: the record of its quality
_OF_MODELS = [table for table in CURRENT.values() if table not in _STAY]


def retire(runtime: Runtime, version: str) -> Report:
    """Deletes the model's rows; the report counts them by table.

    Raises:
        TrailvecError: it is the current model, or no table has a row of it.
    """
    return runtime.execute(Stage("retire_model", "", lambda r: _run(r, version)))


def _run(runtime: Runtime, version: str) -> None:
    mine = F.col("model_version") == version
    tables = [table for table in _OF_MODELS if runtime.exists(table)]
    if runtime.newest_current_model() == version:
        raise TrailvecError(
            f"model {version} is the current one: make another current first with "
            f"`trailvec score_users --set model.version=...`"
        )
    counts = {table.name: runtime.latest(table).where(mine).count() for table in tables}
    if not any(counts.values()):
        found = [runtime.latest(table).select("model_version").distinct().collect() for table in tables]
        names = ", ".join(sorted({row["model_version"] for rows in found for row in rows})) or "none"
        raise TrailvecError(f"no table has a row of model {version} (found: {names}): correct the version")
    # Recorded in this note, for when Delta's log has dropped the older ones. (`weights` is a key of scorings' notes.)
    facts = {"scored": was_scored(runtime, version), "of": description(runtime, version).get("weights_sha256")}
    for table in tables:
        if not counts[table.name]:
            continue  # even an empty commit would make the table's stage run again
        # The note tells score_users that there is no scoring of this model to resume.
        runtime.delete(table, mine, note={"model": {"version": version, "retired": True, **facts}})
    runtime.report.rows_out = counts


def main() -> None:
    stage_main("retire_model")


if __name__ == "__main__":
    main()
