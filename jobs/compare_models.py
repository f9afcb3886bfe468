"""trailvec evaluate --compare A B: two models over the same users, with confidence intervals of their differences.

Both models encode and rank again, over the rows that `sequences` holds now: they need not have been evaluated or
scored, nor share a space. Nothing is written. Each ranks its own catalogue; an item only the other knows is a miss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pyspark.sql import functions as F
from rich import box
from rich.table import Table as Grid
from rich.text import Text

from jobs.cli import table_console
from jobs.errors import TrailvecError
from jobs.evaluate import TASKS, Catalogue, evaluated_rows, following, model_scorer, rank_users, read_catalogue
from jobs.model_folders import model_folder
from jobs.models import item_vectors
from jobs.ranking import bootstrap, measures
from jobs.runtime import Runtime, Stage
from jobs.tables import CONTEXT_VALUES, ITEMS, SEQUENCES


class Difference(NamedTuple):
    """One metric of two models; low and high: the confidence interval of other - one."""

    task: str
    metric: str
    users: int
    one: float
    other: float
    low: float
    high: float


def differences(
    one: tuple[pd.DataFrame, Catalogue], other: tuple[pd.DataFrame, Catalogue], resamples: int
) -> list[Difference]:
    """How two models differ, over the users with a value for both.

    Args:
        one, other: what `evaluated_rows` returns (the same users in the same order), and the model's catalogue.
    """
    ranked = [rank_users(rows, {"model": model_scorer(rows, of)}, of.rankable) for rows, of in (one, other)]
    found = []
    for task in TASKS:
        done = following(one[0], task)
        both = [
            measures(best["model", task == "new"], done, of.target_counts)
            for best, (_, of) in zip(ranked, (one, other), strict=True)
        ]
        pairs = {metric: np.stack([both[0][metric], both[1][metric]]) for metric in both[0]}
        has_both = {metric: ~np.isnan(pair).any(axis=0) for metric, pair in pairs.items()}
        pairs = {
            metric: np.where(has_both[metric], pair, np.nan) for metric, pair in pairs.items() if has_both[metric].any()
        }
        if not pairs:
            continue
        low, high = bootstrap(np.column_stack([pair[1] - pair[0] for pair in pairs.values()]), resamples)
        for number, (metric, pair) in enumerate(pairs.items()):
            means = np.nanmean(pair, axis=1)
            users = int(has_both[metric].sum())
            found.append(Difference(task, metric, users, *map(float, (*means, low[number], high[number]))))
    return found


def compare(runtime: Runtime, versions: tuple[str, str]) -> list[Difference]:
    """The differences between two models, by their versions.

    Raises:
        TrailvecError: a model does not exist, is damaged or has learnt from what it would be asked about; a table is
            missing, or has no rows to ask about.
    """
    found: list[Difference] = []

    def act(runtime: Runtime) -> None:
        folders = [model_folder(runtime, version) for version in versions]
        split = runtime.config.evaluate.split
        if runtime.read(SEQUENCES).where(F.col("split") == split).isEmpty():
            raise TrailvecError(
                f"table sequences has no row of split {split}, so nothing can be ranked: with sequences.split_by = "
                f"time, set sequences.{split}_from to a time within the log, then run `trailvec build_vocabulary` and "
                f"`trailvec build_sequences`"
            )
        both = [
            (
                evaluated_rows(runtime, folder),
                read_catalogue(runtime, item_vectors(runtime, folder).where(~F.col("is_cold")), folder.name),
            )
            for folder in folders
        ]
        found.extend(differences(both[0], both[1], runtime.config.evaluate.resamples))

    stage = Stage("compare", "", act, reads=(SEQUENCES, ITEMS, CONTEXT_VALUES))
    runtime.execute(stage)
    return found


def print_differences(found: list[Difference], versions: tuple[str, str], split: str) -> None:
    """Prints one line per task and metric to stdout."""
    grid = Grid(box=box.SIMPLE, title=f"split {split}; differences with 95 % intervals over the same users")
    for heading in ("task", "metric", "users", *versions, "difference"):
        grid.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    last = ""
    for row in found:
        sure = row.low > 0 or row.high < 0
        colour = "" if not sure or row.metric.startswith("popularity") else "green" if row.low > 0 else "red"
        text = f"{row.other - row.one:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
        cells: list[Any] = [row.task if row.task != last else "", row.metric, f"{row.users:,}"]
        cells += [f"{row.one:.4f}", f"{row.other:.4f}", Text(text, style=colour)]
        grid.add_row(*cells)
        last = row.task
    table_console().print(grid)


def run_compare(runtime: Runtime, versions: tuple[str, str]) -> None:
    """Prints how two models differ."""
    print_differences(compare(runtime, versions), versions, runtime.config.evaluate.split)
