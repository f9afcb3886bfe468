"""The stages in pipeline order. A new stage is a file in `jobs/` and a line here; docs/extending.md has the other
steps."""

from __future__ import annotations

from jobs import (
    align,
    build_sequences,
    build_vocabulary,
    embed_items,
    evaluate,
    export_segments,
    find_neighbours,
    flag_users,
    ingest,
    probe,
    profile_users,
    score_users,
    sessionize,
    train,
    write_report,
)

STAGES = (
    ingest.STAGE,
    flag_users.STAGE,
    sessionize.STAGE,
    build_vocabulary.STAGE,
    build_sequences.STAGE,
    train.STAGE,
    align.STAGE,
    embed_items.STAGE,
    evaluate.STAGE,  # before the model goes live: score_users enforces the evaluation gate
    score_users.STAGE,
    find_neighbours.STAGE,
    export_segments.STAGE,
    write_report.STAGE,  # after the exports: its map shows the segments
)

# Stages that run only when named explicitly.
ASIDE = (profile_users.STAGE, probe.STAGE)
