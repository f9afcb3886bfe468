"""Writes docs/tables.md from jobs/tables.py: python scripts/document_tables.py

Each table with its columns, key and one example query. Tests run every example on tables built to the contract, and
report where the page is out of date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.tables import CURRENT, TABLES, Table

PAGE = Path(__file__).parent.parent / "docs" / "tables.md"

_HEAD = """# The tables

Made from `jobs/tables.py` by `scripts/document_tables.py`: change that file, not this page. Each is a Delta table under
`storage.root`/tables. Times are UTC with microseconds. Examples run with `trailvec sql` or over JDBC (`trailvec
serve_sql`). SQL knows a table once its stage has run.

A table that is partitioned by `model_version` keeps rows of every model, including rejected ones. Its view `current_…`
shows those of the current model: none until the table's stage has run with it. Read the table itself only to compare
models, with `model_version` in SELECT and GROUP BY.

DuckDB reads every table (`INSTALL delta; LOAD delta; SELECT * FROM delta_scan('…/tables/events')`), and so does
delta-rs through its `QueryBuilder`. The `to_pandas` and `to_pyarrow_table` of the pinned deltalake read no table
that may have deletion vectors (`events`, `sessions`, ...), and under pyarrow 14 none that is partitioned. These
readers have no views: they read `current_model` first, each by its own query
([12](decisions/0012-scoring-every-user.md)).

## Vector functions

In `trailvec sql`, `trailvec serve_sql` and any session with `spark_udfs.vectors.register(spark)`, over ARRAY<FLOAT>
(write SELECT before each):

| example | its value | |
|---|---|---|
| `vector_inner_product(array(1F, 2F, 3F), array(4F, 5F, 6F))` | 32 | a user's vector and an item's: the model's score |
| `vector_cosine_similarity(array(1F, 2F, 3F), array(4F, 5F, 6F))` | 0.9746 | how alike two users, or two items, are |
| `vector_l2_distance(array(1F, 2F, 3F), array(4F, 5F, 6F))` | 5.196 | the Euclidean distance |
| `vector_norm(array(3F, -4F))` | 5 | the length; other norms: a second argument 1 or `float('inf')` |
| `vector_normalize(array(3F, 4F))` | [0.6, 0.8] | divided by its norm; the second argument as above |
| `vector_avg(v) FROM VALUES (array(1F, 2F)), (array(3F, 4F)) AS t(v)` | [2, 3] | aggregate: the mean of a group |
| `vector_sum(v) FROM VALUES (array(1F, 2F)), (array(3F, 4F)) AS t(v)` | [4, 6] | aggregate: the sum of a group |
| `vector_top_k(id, v, array(1F, 0F), 1) FROM VALUES ('x', array(1F, 0F)), ('w', array(2F, 0F)) AS t(id, v)` | ['w'] | \
aggregate: the ids (STRING) of a group's k highest inner products with the third argument, best first |

A NULL vector or element gives NULL, and so does the cosine or the normalised form of a zero vector; aggregates skip
such rows. NaN counts as NULL, and without GROUP BY an aggregate over no rows gives no row (a built-in one: NULL). CASE
and IF guard no function, which gets all rows: leave out vectors of another length by WHERE. An aggregate can't be
combined with a built-in one in the same SELECT, and its group must fit into a Python worker: for large groups compute
the inner product in a subquery and rank by `row_number() OVER (PARTITION BY … ORDER BY … DESC)` instead of
`vector_top_k`. Queries over real vectors: [queries](queries.md).
"""

EXAMPLES = {
    "events": """
        SELECT vertical, event_type, count(*) AS events, count(DISTINCT user_id) AS users
        FROM events GROUP BY vertical, event_type ORDER BY events DESC""",
    "rejected_events": """
        SELECT source, reason, count(*) AS records, min(raw) AS for_example
        FROM rejected_events GROUP BY source, reason ORDER BY records DESC""",
    "flagged_users": """
        SELECT rule, count(DISTINCT user_id) AS users, max(value) AS highest
        FROM flagged_users GROUP BY rule""",
    "sessions": """
        SELECT percentile(event_count, 0.5) AS median_events, avg(amount) AS mean_amount,
               avg(timestampdiff(MINUTE, start_ts, end_ts)) AS mean_minutes
        FROM sessions""",
    "items": """
        SELECT item_name, category, event_count, unit_price FROM items
        WHERE target_count >= 10 ORDER BY event_count DESC LIMIT 10""",
    "context_values": """
        SELECT kind, count(*) AS numbers, max_by(value, value_index) AS newest
        FROM context_values GROUP BY kind""",
    "sequences": """
        SELECT split, count(*) AS rows, count(DISTINCT user_id) AS users, sum(length) AS actions
        FROM sequences GROUP BY split""",
    "user_embeddings": """
        SELECT a.user_id, vector_cosine_similarity(a.vector, b.vector) AS likeness
        FROM current_user_embeddings AS a CROSS JOIN current_user_embeddings AS b
        WHERE b.user_id = '1' AND a.user_id <> '1' ORDER BY likeness DESC LIMIT 10""",
    "user_profiles": """
        SELECT a.user_id, vector_cosine_similarity(a.vector, b.vector) AS likeness
        FROM current_user_profiles AS a CROSS JOIN current_user_profiles AS b
        WHERE b.user_id = '1' AND a.user_id <> '1' ORDER BY likeness DESC LIMIT 10""",
    "current_model": """
        SELECT count(*) AS users, avg(vector_norm(vector)) AS mean_norm FROM current_user_embeddings""",
    "item_embeddings": """
        SELECT n.rank, i.item_name, n.score FROM nearest_items('1', 10) AS n JOIN items AS i USING (item_id)
        ORDER BY n.rank""",
    "evaluation": """
        SELECT task, method, value, low, high, counted AS users FROM current_evaluation
        WHERE metric = 'ndcg@10' AND split = 'test' AND slice = 'all' ORDER BY task, value DESC""",
    "probes": """
        SELECT task, features, max_by(head, value) AS best_head, max(value) AS auc FROM current_probes
        WHERE metric = 'auc' GROUP BY task, features ORDER BY task, auc DESC""",
    "neighbours": """
        SELECT n.rank, i.item_name, n.score FROM current_neighbours AS n JOIN items AS i ON i.item_id = n.neighbour_id
        WHERE n.kind = 'user_item' AND n.source_id = '1' ORDER BY n.rank""",
    "exports": """
        SELECT segment, export_id, min(exported_at) AS exported_at, count(*) AS members,
               count_if(is_control) AS control
        FROM exports GROUP BY segment, export_id ORDER BY exported_at DESC, segment""",
    "erasures": """
        SELECT requested_by, requested_at, users, finished_at, aggregate(tables, 0L, (n, t) -> n + t.rows) AS rows
        FROM erasures ORDER BY requested_at DESC""",
    "erased_users": """
        SELECT erasure_id, min(erased_at) AS erased_at, count(*) AS users FROM erased_users GROUP BY erasure_id""",
}


def page() -> str:
    """The expected text of docs/tables.md."""
    return "\n".join([_HEAD, *(_section(table) for table in TABLES)])


def _section(table: Table) -> str:
    facts = [
        f"key {_names(table.key)}" if table.key else "rows have no key",
        f"partitioned by {_names(table.partition_by)}" if table.partition_by else "",
        f"clustered by {_names(table.cluster_by)}" if table.cluster_by else "",
        f"view of the current model `current_{table.name}`" if table in CURRENT.values() else "",
        f"written by `trailvec {table.stage}`",
    ]
    lines = [f"## {table.name}", "", table.comment, "", "; ".join(filter(None, facts)).capitalize() + ".", ""]
    lines += ["| column | type | may be NULL | |", "|---|---|---|---|"]
    for column in table.columns:
        cells = (f"`{column.name}`", f"`{column.type}`", "yes" if column.nullable else "", column.comment)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    query = EXAMPLES.get(table.name)
    if query is None:
        raise SystemExit(f"table {table.name} has no example: add one to EXAMPLES in {Path(__file__).name}")
    return "\n".join(
        [*lines, "", "```sql", *(line.removeprefix(" " * 8) for line in query.strip("\n").split("\n")), "```", ""]
    )


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
