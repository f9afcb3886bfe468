"""align: the model in use + the current model's vectors → models/<version>/alignment.json, alignment.safetensors.

Retraining rotates the embedding space: whatever consumers learnt on the old vectors is meaningless on the new ones.
This stage aligns the new model's space with the current one's by the rotation that brings the items that both models
learnt closest together (spark_udfs/alignment.py). Dot products and cosines within the new model do not change. The
rotation is computed once per model and stored with it; embed_items and score_users apply it to the vectors they write.

alignment.json says how similar the two spaces are, on a sample (of users, only those who have not acted since the old
vectors were computed): the cosine of a user's old and new vector before and after the rotation; how many of the 10
nearest items of a user and of an item stay the same (and how many would by chance alone: many, if there are few items);
how norms and the verticals' centroids moved. If too few neighbours stay or the ranking degrades too much (`align.*`),
the stage ends with an error, nothing is scored, and the current model stays current.

trailvec align --conf conf/local.toml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import AlignSettings
from jobs.errors import TrailvecError
from jobs.model_folders import add_to_model, description, model_folder, trained_again
from jobs.models import encode_sequences, item_vectors, stacked
from jobs.runtime import Runtime, Stage
from jobs.spark_session import collect_sorted, drawn_by_hash, persisted
from jobs.tables import CONTEXT_VALUES, ITEM_EMBEDDINGS, ITEMS, SEQUENCES, USER_EMBEDDINGS, of_model
from spark_udfs.alignment import cross_products, mean_cosine, overlap, rotation_of
from spark_udfs.topk import Metric
from training.arrays import Float32
from training.checkpoint import ALIGNMENT, ROTATION, read_alignment, read_description, write_alignment

USERS_COMPARED, ITEMS_COMPARED, ITEMS_ASKED, NEIGHBOURS = 2_000, 20_000, 2_000, 10
# With fewer, chance decides: two users with a true overlap of 20 % are measured below 10 % in 7 % of cases (binomial,
# 20 independent neighbours).
FEWEST_USERS = 50
# With fewer held-out users, too: of two models as good (simulated: a quarter of the users hit, a mean of .125), the
# later one's NDCG@10, if the earlier one's is above 0, is over a tenth lower in 11 % of cases with 1,000 users, in 36 %
# with 100, in 69 % with three.
FEWEST_HELD = 1_000
_ASKED = (  # what decides which items validation asks for, and which it ranks
    *(("sequences", name) for name in ("split_by", "target_event_types", "seen_days")),
    ("vocabulary", "min_count"),
)


def has_no_items(runtime: Runtime, version: str) -> bool:
    """Whether no item has a vector of this model: its users would have no items to compare with, and no later model
    could be aligned to it."""
    return not runtime.exists(ITEM_EMBEDDINGS) or of_model(runtime.latest(ITEM_EMBEDDINGS), version).isEmpty()


def _few_held(report: dict[str, Any]) -> bool:
    """Whether a model's validation has too few users for its ranking to be compared."""
    return bool(report.get("ranking", {}).get("held_users", FEWEST_HELD) < FEWEST_HELD)  # older versions: not written


def refusal(report: dict[str, Any], settings: AlignSettings) -> str | None:
    """Why the model must not become current, in one sentence with the figures; None if it may."""
    reasons = []
    for kind, of, fewest in (("users", "a user's", FEWEST_USERS), ("items", "an item's", 0)):
        compared = report.get(kind, {})
        share = compared.get("overlap@10")
        if share is not None and share < settings.min_overlap and compared.get("compared", fewest) >= fewest:
            reasons.append(f"{share:.2%} of {of} 10 nearest items stay (align.min_overlap = {settings.min_overlap:g})")
    ranking = report.get("ranking", {})
    if ranking.get("old") and ranking.get("new") is not None and not _few_held(report):
        lost = 1 - ranking["new"] / ranking["old"]
        if lost > settings.max_ranking_loss:
            reasons.append(
                f"NDCG@10 in validation fell by {lost:.2%}, from {ranking['old']:.4f} to {ranking['new']:.4f} "
                f"(align.max_ranking_loss = {settings.max_ranking_loss:g})"
            )
    if not reasons:
        return None
    return (
        f"model {report['model_version']} must not replace {report['onto']}: {', and '.join(reasons)}; "
        f"train another model (train.warm_start = true keeps the space) or change the limit"
    )


def too_few_items(report: dict[str, Any], settings: AlignSettings) -> str | None:
    """Why there are too few items for the limit on neighbours: one sentence; None if there are enough, or no limit."""
    by_chance = report.get("items", {}).get("overlap@10_by_chance", 0.0)  # older versions did not write it
    if not by_chance >= settings.min_overlap > 0:
        return None
    return (
        f"with so few items ({report['shared_items']:,}), {by_chance:.2%} of the 10 nearest would stay by chance "
        f"alone: align.min_overlap = {settings.min_overlap:g} says nothing about model {report['model_version']}"
    )


def too_few_users(report: dict[str, Any], settings: AlignSettings) -> str | None:
    """Why there are too few users for the limit on neighbours: one sentence; None if there are enough, or no limit."""
    compared = report.get("users", {}).get("compared", FEWEST_USERS)
    if compared >= FEWEST_USERS or not settings.min_overlap:
        return None
    return (
        f"{compared:,} users with a vector of model {report['onto']} have not acted since and are not cold, fewer than "
        f"the {FEWEST_USERS} needed: align.min_overlap is checked on items alone for model {report['model_version']}"
    )


def no_ranking(report: dict[str, Any], settings: AlignSettings) -> str | None:
    """Why the limit on the ranking can't be applied, in one sentence; None if it can, if there is no limit, or if
    neither model has a ranking to compare."""
    ranking = report.get("ranking", {})
    old, new, asks = (ranking.get(which) for which in ("old", "new", "asks"))
    nothing_missing = bool(old) == (new is not None) and not (old and _few_held(report))
    if nothing_missing or settings.max_ranking_loss == 1:
        return None
    if new is None:
        why = "nobody in its valid split has a next item that it knows"
    elif asks:
        why = f"its validation asks something else than that of {report['onto']} ({asks})"
    elif old:
        why = f"a validation had {ranking['held_users']:,} held-out users, fewer than the {FEWEST_HELD:,} needed"
    else:
        why = f"NDCG@10 in validation of {report['onto']} is {'not known' if old is None else '0'}"
    return f"align.max_ranking_loss says nothing about model {report['model_version']}: {why}"


def check_again(runtime: Runtime, folder: Path) -> None:
    """Raises TrailvecError if this is the current model, retrained to other weights, and must not replace its own
    vectors, which readers see, or `align` has not checked it yet."""
    newest = next((provenance["note"]["model"]["version"] for provenance in runtime.noted(USER_EMBEDDINGS)), None)
    if newest not in (None, folder.name) and runtime.newest_current_model() != folder.name:
        return  # a model that was never scored is in no note: the whole log would be read, each time
    if not trained_again(runtime, folder) or runtime.newest_current_model() != folder.name:
        return
    report = read_alignment(folder)
    if report is None:
        raise TrailvecError(
            f"model {folder.name}, the current one, was trained again and is not aligned with its earlier vectors "
            f"yet: run `trailvec align` first"
        )
    if why := refusal(report, runtime.config.align):
        raise TrailvecError(why)


# ---- the comparison ----------------------------------------------------------------------------------------------


def compare(
    users: tuple[Float32, Float32], items: tuple[Float32, Float32], verticals: pd.Series[str], rotation: Float32 | None
) -> dict[str, Any]:
    """How similar the new space, once rotated, is to the old one, over the same users and items in both.

    Args:
        users, items: (new, old), float32 [n, width] each; the new ones are not rotated.
        verticals: of the items, [n].
        rotation: None if the spaces can't be aligned (widths may differ): only neighbours and norms are compared.
    """
    report: dict[str, Any] = {}
    first = items[0][:ITEMS_ASKED], items[1][:ITEMS_ASKED]
    sides: tuple[tuple[str, tuple[Float32, Float32], tuple[Float32, Float32], Metric], ...] = (
        ("users", users, users, "dot"),
        ("items", items, first, "cosine"),
    )
    for name, (new, old), queries, metric in sides:
        report[name] = {
            "compared": len(new),
            # A rotation leaves neighbours unchanged.
            "overlap@10": _rounded(overlap(queries, items, NEIGHBOURS, metric, ids=name == "items")),
            "overlap@10_by_chance": _rounded(min(1.0, NEIGHBOURS / max(1, len(items[0]) - (name == "items")))),
            "mean_norm": {"old": _rounded(_norms(old)), "new": _rounded(_norms(new))},
        }
        if rotation is not None:
            report[name]["cosine_before"] = _rounded(mean_cosine(new, old))
            report[name]["cosine_after"] = _rounded(mean_cosine(new @ rotation, old))
    if rotation is None:
        return report
    rotated = items[0] @ rotation
    report["centroids"] = {}
    for vertical in sorted(verticals.unique()):
        of = (verticals == vertical).to_numpy()
        centres = [matrix[of].mean(axis=0, keepdims=True) for matrix in (rotated, items[1])]
        report["centroids"][vertical] = {
            "items": int(of.sum()),
            "cosine": _rounded(mean_cosine(*centres)),
            "moved": _rounded(float(np.linalg.norm(centres[0] - centres[1]) / (np.linalg.norm(centres[1]) or 1.0))),
        }
    return report


def _norms(vectors: Float32) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean()) if len(vectors) else float("nan")


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


# ---- the stage ---------------------------------------------------------------------------------------------------


def run(runtime: Runtime) -> None:
    folder = model_folder(runtime)
    report = read_alignment(folder)
    if report is None or (runtime.forced and runtime.newest_current_model() != folder.name):
        rotation, report = _align(runtime, folder)
        write_alignment(folder, rotation, report)
        add_to_model(runtime, folder, ROTATION, ALIGNMENT)
    else:
        runtime.report.skipped = True
    runtime.report.notes.append(report["said"])
    notes = (check(report, runtime.config.align) for check in (too_few_items, too_few_users, no_ranking))
    runtime.report.notes += filter(None, notes)
    why = refusal(report, runtime.config.align)
    if why and (runtime.newest_current_model() != folder.name or trained_again(runtime, folder)):
        raise TrailvecError(why)


def _align(runtime: Runtime, folder: Path) -> tuple[Float32 | None, dict[str, Any]]:
    """The model's rotation into the current one's space, float32 [width, width], if there is one; and the report."""
    about, onto = read_description(folder), runtime.newest_current_model()
    report: dict[str, Any] = {
        "model_version": folder.name,
        "onto": onto,
        "said": f"model {folder.name}: there are no vectors to align it with: its space stays as it is",
        "provenance": runtime.provenance(),
    }
    # The current model itself, retrained: to other weights, else train would have kept its alignment (jobs/train.py).
    itself = onto == folder.name
    if onto is None or (itself and has_no_items(runtime, onto)):
        return None, report
    if has_no_items(runtime, onto):
        raise TrailvecError(
            f"model {onto}, the current one, has no item vectors to align another model with: run "
            f"`trailvec embed_items --set model.version={onto}` first"
        )
    width = int(about["spec"]["width"])
    rotation: Float32 | None = None
    with persisted(_pairs(runtime, folder, onto)) as pairs:
        widths = {row["width"] for row in pairs.select(F.size("old").alias("width")).distinct().collect()}
        if widths == {width}:
            products, shared = cross_products(pairs, width)
            why = f"{shared:,} items that both have learnt, fewer than the width {width}"
            if shared >= width:
                rotation = rotation_of(products).astype(np.float32)
        else:
            shared, why = pairs.count(), f"widths {widths or '{}'} and {width}"
        some = (
            pairs.where(drawn_by_hash(ITEMS_COMPARED / max(1, shared), "item_id", F.lit("align")))
            .orderBy(F.xxhash64("item_id"), "item_id")
            .toPandas()
        )
    both = collect_sorted(_users(runtime, folder, onto), "user_id")
    items, users = ((stacked(rows["new"], width), stacked(rows["old"], width)) for rows in (some, both))
    report |= {"shared_items": shared, **compare(users, items, some["vertical"], rotation)}
    report["ranking"] = _rankings(runtime, onto, folder.name)
    of_users = report["users"]
    report["said"] = (
        f"model {folder.name} can't be aligned with {onto} (found {why}): its space is a new one"
        if rotation is None
        else f"model {folder.name} aligned with {onto} by {shared:,} items: cosine of a user's old and new vectors "
        f"{_text(of_users['cosine_before'])} → {_text(of_users['cosine_after'])}; share of the 10 nearest items kept "
        f"{_text(of_users['overlap@10'])} (users), {_text(report['items']['overlap@10'])} (items)"
    )
    return rotation, report


def _pairs(runtime: Runtime, folder: Path, onto: str) -> DataFrame:
    """item_id, vertical, new, old: the items that both models have learnt; new is not rotated."""
    old = of_model(runtime.latest(ITEM_EMBEDDINGS), onto).where("NOT is_cold")
    new = item_vectors(runtime, folder, aligned=False).where(~F.col("is_cold"))
    both = new.select("item_id", F.col("vector").alias("new")).join(
        old.select("item_id", F.col("vector").alias("old")), "item_id"
    )
    return both.join(runtime.read(ITEMS).select("item_id", "vertical"), "item_id")


def _users(runtime: Runtime, folder: Path, onto: str) -> DataFrame:
    """user_id, new, old of about USERS_COMPARED users who are not cold and have not acted since the old vector was
    computed, since a longer history moves a vector too. new is not rotated."""
    old = of_model(runtime.latest(USER_EMBEDDINGS), onto).where("NOT is_cold")
    rows = runtime.read(SEQUENCES).where("split = 'score'").join(old, ["user_id", "as_of"], "left_semi")
    rows = rows.where(drawn_by_hash(USERS_COMPARED / max(1, rows.count()), "user_id", F.lit("align")))
    new = encode_sequences(runtime, rows, ["user_id"], model_dir=folder, aligned=False)
    both = new.where(~F.col("is_cold")).select("user_id", F.col("vector").alias("new"))
    # Spark can't know how few they are, and would shuffle everyone's old vector.
    return F.broadcast(both).join(old.select("user_id", F.col("vector").alias("old")), "user_id")


def _rankings(runtime: Runtime, onto: str, version: str) -> dict[str, Any]:
    """NDCG@10 of the old and the new model, and the lower number of users that one of them is over. The old one is
    None, and `asks` names the setting, if it answers another question than the new one."""
    abouts = [description(runtime, of) for of in (version, onto)]
    asks = _asks_otherwise(*(about.get("provenance", {}).get("config", {}) for about in abouts))
    new, old = map(_ranking, abouts)
    held = min(about.get("training", {}).get("held_users", FEWEST_HELD) for about in abouts)
    return {"old": None if asks else old, "new": new, "asks": asks, "held_users": held}


def _asks_otherwise(new: dict[str, Any], old: dict[str, Any]) -> str | None:
    """The first setting by which the validations of two models ask different questions, in words; None: they ask the
    same, or a model does not say. Arguments: the configuration in each model's provenance."""
    for section, name in _ASKED:
        now, was = (config.get(section, {}).get(name) for config in (new, old))
        # As validation asks for new items only with seen_days = 0, other days make no difference.
        if None not in (now, was) and now != was and not (name == "seen_days" and now and was):
            return f"{section}.{name} = {now}, not {was}"
    return None


def _ranking(about: dict[str, Any]) -> float | None:
    """NDCG@10 of the kept epoch in the model's own validation; None if it is not known (any more)."""
    training = about.get("training", {})
    epochs = training.get("epochs", [])
    return epochs[training["best_epoch"] - 1].get("ndcg@10") if epochs else None


def _text(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


STAGE = Stage(
    "align",
    "rotate a new model's space into the current one's, and reject a model that changed too much",
    run,
    reads=(ITEMS, CONTEXT_VALUES, SEQUENCES),
    writes=(),
    settings=(),
    also="It also reads the model and, to align it with the current one, current_model, item_embeddings and "
    "user_embeddings; it writes alignment.json and alignment.safetensors into the model's folder.",
)


def main() -> None:
    stage_main("align")


if __name__ == "__main__":
    main()
