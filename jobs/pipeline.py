"""The stages in the order of the road. A new stage is a file in `jobs/` and a line here; the other steps stand in
docs/extending.md."""

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
    evaluate.STAGE,  # before anybody sees the model: its gate stands in score_users
    score_users.STAGE,
    find_neighbours.STAGE,
    export_segments.STAGE,
    write_report.STAGE,  # its map shows the segments
)

# Stages that run only when they are asked for by name.
ASIDE = (profile_users.STAGE, probe.STAGE)
