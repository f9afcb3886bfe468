"""Runs the pipeline on the demo data and shows the results, for somebody new to trailvec."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.rule import Rule
from rich.table import Table as Grid

from jobs.cli import guarded, run_stages
from jobs.config import load_config
from jobs.evaluation_page import METHODS
from jobs.files import Place
from jobs.model_folders import model_folder
from jobs.pipeline import STAGES
from jobs.runtime import Runtime
from jobs.sql import run_sql
from jobs.sql_names import register_tables
from jobs.write_report import PAGE

screen = Console(highlight=False)

TASKS = {
    "new": "a new purchase (not in the last 28 days)",
    "repeat": "a repeat purchase",
    "next": "any next purchase",
}
LAST_BASKETS = """
SELECT concat_ws(' · ', slice(collect_list(item_name), 1, 6)) AS items FROM (
  SELECT DISTINCT item_name, event_ts FROM events WHERE user_id = :user AND event_type = 'purchase'
  ORDER BY event_ts DESC LIMIT 6)
"""
NEAREST = """
SELECT concat_ws(' · ', collect_list(item_name)) AS items FROM (
  SELECT i.item_name FROM neighbours n JOIN items i ON i.item_id = n.neighbour_id
  WHERE n.kind = 'user_item' AND n.source_id = :user AND n.model_version = :model AND n.rank <= 6 ORDER BY n.rank)
"""
ANSWERS = (
    (
        "Which items are used like the most bought one? (cosine of item vectors)",
        """
        SELECT i.item_name, i.vertical, round(n.score, 3) AS cosine
        FROM neighbours n JOIN items i ON i.item_id = n.neighbour_id
        WHERE n.kind = 'item_item' AND n.rank <= 5
          AND n.model_version = (SELECT model_version FROM current_model)
          AND n.source_id = (SELECT max_by(item_id, target_count) FROM items)
        ORDER BY n.rank""",
    ),
    (
        "Which large departments are used most alike? (vector functions)",
        """
        WITH centres AS (
          SELECT i.vertical, vector_avg(e.vector) AS centre FROM current_item_embeddings e JOIN items i USING (item_id)
          WHERE i.vertical IN (SELECT vertical FROM items GROUP BY vertical HAVING sum(target_count) > 10000)
          GROUP BY i.vertical)
        SELECT a.vertical AS one, b.vertical AS other, round(vector_cosine_similarity(a.centre, b.centre), 3) AS cosine
        FROM centres a JOIN centres b ON a.vertical < b.vertical ORDER BY cosine DESC LIMIT 5""",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    parser.parse_args()
    screen.print("[bold]trailvec[/]: a year of purchases → a vector for every household and item\n")
    runtime = Runtime(load_config("conf/local.toml"))
    run_stages(runtime, STAGES)
    model = model_folder(runtime).name
    show_ranking(runtime, model)
    show_users(runtime, model)
    for question, text in ANSWERS:
        title(f"SQL: {question}")
        screen.print(text, style="dim", soft_wrap=True)
        run_sql(runtime, text, as_json=False)
    show_places(runtime, model)


def title(text: str) -> None:
    screen.print()
    screen.print(Rule(text, align="left"))


def show_ranking(runtime: Runtime, model: str) -> None:
    title("What a household buys next, in December")
    screen.print("never seen in training; ranked: items bought in training that the model knows", style="dim")
    register_tables(runtime)
    rows = runtime.spark.sql(
        """SELECT task, method, metric, value, counted FROM evaluation
        WHERE model_version = :model AND split = :split AND slice = 'all' AND task IN ('next', 'new', 'repeat')""",
        {"model": model, "split": runtime.config.evaluate.split},  # rows of the other split stay in the table
    ).collect()
    value = {(r.task, r.method, r.metric): r.value for r in rows}
    users = {r.task: r.counted for r in rows if r.metric == "ndcg@10"}
    metrics = ("ndcg@10", "recall@10", "ndcg@20", "recall@20", "mrr@20")
    for task, meaning in TASKS.items():
        screen.print(f"\n[bold]{meaning}[/], {users[task]:,} users")
        grid = Grid(box=None, pad_edge=False)
        grid.add_column("", min_width=30)
        for metric in metrics:
            grid.add_column(metric, justify="right")
        best = {metric: max(value[task, method, metric] for method in METHODS) for metric in metrics}
        for method, name in METHODS.items():
            cells = [(value[task, method, m], value[task, method, m] == best[m]) for m in metrics]
            grid.add_row(f"  {name}", *[f"[green]{v:.4f}[/]" if first else f"{v:.4f}" for v, first in cells])
        screen.print(grid)


def show_users(runtime: Runtime, model: str) -> None:
    title("Three households")
    users = runtime.spark.sql(
        "SELECT user_id FROM user_embeddings WHERE model_version = :model ORDER BY md5(user_id) LIMIT 3",
        {"model": model},
    ).collect()
    for row in users:
        values = {"user": row.user_id, "model": model}
        bought = runtime.spark.sql(LAST_BASKETS, {"user": row.user_id}).collect()[0]["items"]
        nearest = runtime.spark.sql(NEAREST, values).collect()[0]["items"]
        screen.print(f"[bold]household {row.user_id}[/]")
        grid = Grid(box=None, show_header=False)
        grid.add_row("bought last", bought)
        grid.add_row("nearest items", nearest)
        screen.print(grid)


def show_places(runtime: Runtime, model: str) -> None:
    title("Where to find the results")
    lines = [
        f"tables   {runtime.root / 'tables'}   (trailvec tables --conf conf/local.toml)",
        f"model    {runtime.models / model}",
        f"page     {runtime.models / model / PAGE}   (open it in a browser)",
    ]
    manifests: list[Place] = [*runtime.exports.glob("*/manifest.json")]
    for manifest in sorted(manifests):
        exported = json.loads(manifest.read_text())["counts"]["exported"]
        lines.append(f"segment  {manifest.parent}   ({exported:,} users, ids hashed)")
    lines.append('\nNext: [bold].venv/bin/trailvec sql --conf conf/local.toml "SELECT * FROM items LIMIT 5"[/]')
    screen.print("\n".join(lines), soft_wrap=True)  # paths and commands are meant to be copied


if __name__ == "__main__":
    raise SystemExit(guarded(main, debug="--debug" in sys.argv))
