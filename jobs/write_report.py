"""write_report: evaluation, item_embeddings, user_embeddings, exports, probes → models/<version>/evaluation.html.

One self-contained page about the model in use, readable offline (jobs/evaluation_page.py). It is attached to the
model's MLflow run, if there is one. It uses a hash sample of the items, so any catalogue size will do.

trailvec write_report --conf conf/local.toml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import Window
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.evaluate import item_sample
from jobs.evaluation_page import Example, Facts, Map, Neighbour, page
from jobs.model_folders import add_to_model, description, model_folder
from jobs.models import stacked
from jobs.runtime import Runtime, Stage
from jobs.space import flat_map, unit
from jobs.tables import EVALUATION, EXPORTS, ITEM_EMBEDDINGS, ITEMS, PROBES, USER_EMBEDDINGS, of_model
from jobs.tracking import attach
from training.checkpoint import read_description
from training.stores import write_whole

PAGE = "evaluation.html"
MAPPED = 1_500  # items on the map, and about as many users on theirs: each adds to the page's size
SEGMENTS_MAPPED = 7  # the largest
EXAMPLES, NEAR = 8, 5


def examples(items: pd.DataFrame) -> list[Example]:
    """The most popular item of each of the largest verticals, with its nearest items by cosine.

    Args:
        items: item_id, item_name (None: the id is shown), vertical, target_count, vector (never zero).
    """
    directions = unit(stacked(items["vector"]))
    names = items["item_name"].fillna(items["item_id"]).tolist()
    verticals = items["vertical"].tolist()
    largest = items.groupby("vertical")["target_count"].sum().sort_values(ascending=False, kind="stable")
    found = []
    for vertical in largest.index[:EXAMPLES]:
        place = int(items["target_count"].where(items["vertical"] == vertical, -1).to_numpy().argmax())
        cosines = directions @ directions[place]
        order = [int(other) for other in np.argsort(-cosines, kind="stable") if other != place][:NEAR]
        near = [Neighbour(names[other], verticals[other], float(cosines[other])) for other in order]
        found.append(Example(names[place], str(vertical), near))
    return found


def run(runtime: Runtime) -> None:
    folder = model_folder(runtime)
    target = folder / PAGE
    if not runtime.forced and _fingerprint_of(target) == runtime.fingerprint:
        runtime.report.skipped = True
        return
    text = page(_facts(runtime, folder))
    attach(runtime.config.train.tracking_uri, runtime.place, folder.name, (PAGE, text), runtime.report.notes.append)
    write_whole(target, text)  # last: its fingerprint marks the stage as done
    add_to_model(runtime, folder, PAGE)
    runtime.report.rows_out["page"] = 1
    runtime.report.notes.append(f"{runtime.models / folder.name / PAGE} ({len(text) / 1024:,.0f} kB)")


def _facts(runtime: Runtime, folder: Path) -> Facts:
    split = runtime.config.evaluate.split
    rows = runtime.read(EVALUATION).where(F.col("split") == split)
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in rows.where((F.col("model_version") == folder.name) | (F.col("slice") == "all")).collect():
        by_model.setdefault(row["model_version"], []).append(row.asDict())
    if folder.name not in by_model:
        raise TrailvecError(
            f"table evaluation has no row of model {folder.name} in split {split}: run `trailvec evaluate` first"
        )
    current = runtime.newest_current_model()
    abouts = {version: description(runtime, version) for version in by_model}
    versions = [(version, version == current, abouts[version], of) for version, of in by_model.items()]
    newest_first = sorted(versions, key=lambda of: (of[2].get("as_of", ""), of[0]), reverse=True)
    warm = of_model(runtime.read(ITEM_EMBEDDINGS), folder.name).where("NOT is_cold")
    items = item_sample(runtime, warm, "item_id", "item_name", "vertical", "target_count", "vector")
    # A zero vector has no direction.
    items = items[stacked(items["vector"]).any(axis=1)].reset_index(drop=True)
    users = _users(runtime, folder.name)
    return Facts(
        fingerprint=runtime.fingerprint,
        version=folder.name,
        split=split,
        about=read_description(folder),
        rows=by_model[folder.name],
        versions=newest_first,
        items=_map(items.iloc[:MAPPED], items["vertical"]),
        users=_map(users, users["segment"]),
        examples=examples(items) if len(items) > 1 else [],
        sample=len(items),
        probes=_probes(runtime, folder.name),
    )


def _users(runtime: Runtime, version: str) -> pd.DataFrame:
    """vector, segment (None: drawn from all users) of the users to show; empty without user vectors or exports."""
    if not (runtime.exists(USER_EMBEDDINGS) and runtime.exists(EXPORTS)):
        return pd.DataFrame({"vector": [], "segment": []})
    vectors = of_model(runtime.latest(USER_EMBEDDINGS), version).where("NOT is_cold")
    log = of_model(runtime.latest(EXPORTS), version)
    exports = log.groupBy("segment", "export_id").agg(F.max("exported_at").alias("at"), F.count("*").alias("members"))
    newest = F.max_by(F.struct("export_id", "members"), F.struct("at", "export_id"))
    last = exports.groupBy("segment").agg(newest.alias("last")).select("segment", "last.*")
    largest = last.orderBy(F.desc("members"), "segment").limit(SEGMENTS_MAPPED)
    place = F.row_number().over(Window.partitionBy("segment").orderBy(F.xxhash64("user_id"), "user_id"))
    members = log.join(F.broadcast(largest), ["segment", "export_id"]).withColumn("place", place)
    some = members.where(F.col("place") <= MAPPED // 2 // SEGMENTS_MAPPED)
    # Show users of several segments in the smallest, which is the hardest to see.
    one = some.groupBy("user_id").agg(F.min_by("segment", F.struct("members", "segment")).alias("segment"))
    everybody = vectors.orderBy(F.xxhash64("user_id"), "user_id").limit(MAPPED // 2).select("user_id")
    shown = everybody.join(one, "user_id", "full_outer")
    rows = vectors.join(F.broadcast(shown), "user_id").select("user_id", "segment", "vector")
    found = rows.orderBy(F.xxhash64("user_id"), "user_id").toPandas()
    return found.drop(columns="user_id") if found["segment"].notna().any() else found.iloc[:0]


def _map(rows: pd.DataFrame, groups: pd.Series[Any]) -> Map:
    """The map of the vectors (none may be zero); an empty map for fewer than two."""
    if len(rows) < 2:
        return Map()
    points, shares = flat_map(stacked(rows["vector"]))
    return Map(points, [None if pd.isna(group) else str(group) for group in groups.loc[rows.index]], shares.tolist())


def _probes(runtime: Runtime, version: str) -> list[dict[str, Any]]:
    """The model's rows in the table written by `trailvec probe`; empty if it never ran."""
    if not runtime.exists(PROBES):
        return []
    rows = of_model(runtime.latest(PROBES), version).orderBy(*PROBES.key).collect()
    return [row.asDict() for row in rows]


def _fingerprint_of(target: Path) -> str | None:
    """The fingerprint recorded in an existing page; None without a page."""
    if not target.exists():
        return None
    with target.open(encoding="utf-8") as file:
        head = file.read(2_000)
    _, _, rest = head.partition('<meta name="fingerprint" content="')
    return rest.partition('"')[0] or None


def _inputs(runtime: Runtime) -> dict[str, Any]:
    return {
        "model_version": model_folder(runtime).name,
        "current": runtime.newest_current_model(),
        **{t.name: runtime.state(t) for t in (*STAGE.reads, PROBES, EXPORTS, USER_EMBEDDINGS) if runtime.exists(t)},
    }


STAGE = Stage(
    "write_report",
    "write the report page about the model: ranking, the space, training, versions",
    run,
    reads=(EVALUATION, ITEMS, ITEM_EMBEDDINGS),
    writes=(),
    settings=("evaluate",),
    also="It also reads the model, current_model and, if they exist, user_embeddings, exports and probes; it writes "
    "evaluation.html into the model's folder.",
    inputs=_inputs,
)


def main() -> None:
    stage_main("write_report")


if __name__ == "__main__":
    main()
