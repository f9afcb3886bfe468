"""export_segments: user_embeddings (and what a segment's SQL reads) → files under exports/<segment>/.

A segment is a small TOML file (`export.segments`; conf/segments/lookalike_demo.toml is one): a seed list, and how
many of the other users who are most like a seed. A user's score is their highest cosine to any one seed, so seeds of
several tastes stay several tastes; ties go to the smaller user id. A user with a zero vector is like nobody, and
counts as unknown among the seeds. The folder holds Parquet parts and a
manifest.json, and takes the place of the last export only when it is whole. The same input gives the same bytes.

User ids leave as HMAC-SHA256 with the key in the environment's TRAILVEC_EXPORT_KEY, taken on the driver as the rows
are written: neither a Spark plan nor a file ever holds the key.

trailvec export_segments --conf conf/local.toml
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.config import parse, read_toml
from jobs.errors import TrailvecError
from jobs.runtime import Runtime, Stage, published, write_json
from jobs.sql import query
from jobs.tables import CURRENT_MODEL, TABLES, USER_EMBEDDINGS
from spark_udfs.topk import nearest, small_batches
from training.config import Section

KEY = "TRAILVEC_EXPORT_KEY"
_ROWS_PER_FILE = 1_000_000
_COLUMNS = {"user_id": pa.string(), "score": pa.float32(), "rank": pa.int32()}


class Seeds(Section):
    """The users that a segment is to be like: one of the two."""

    file: str | None = Field(None, description="text, one user id per line; relative to the segment's file")
    sql: str | None = Field(None, description="a query over the tables with a column user_id")

    @model_validator(mode="after")
    def _one_of_two(self) -> Seeds:
        if (self.file is None) == (self.sql is None):
            raise ValueError("give either file or sql")
        return self


class Segment(Section):
    """A segment's file."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="also the name of its folder")
    owner: str = Field(min_length=1, description="who answers for it")
    purpose: str = Field(min_length=1, description="what it is for")
    seeds: Seeds
    size: int = Field(ge=1, description="users to export; fewer where there are fewer")
    columns: tuple[Literal["user_id", "score", "rank"], ...] = Field(("user_id", "score", "rank"), min_length=1)
    user_ids: Literal["hashed", "plain"] = "hashed"
    approved_by: str | None = Field(None, min_length=1, description="who allowed plain user ids")

    @model_validator(mode="after")
    def _plain_is_approved(self) -> Segment:
        if self.user_ids == "plain" and self.approved_by is None:
            raise ValueError("plain user ids need approved_by, the name of who allowed them")
        return self

    @model_validator(mode="after")
    def _columns_once(self) -> Segment:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("a column stands in columns twice")
        return self


class SegmentFile(NamedTuple):
    segment: Segment
    path: Path


def read_segments(paths: list[str]) -> list[SegmentFile]:
    """The segments of the files.

    Raises:
        TrailvecError: a file is missing or wrong, two have one name, or a seed list is missing.
    """
    files = [SegmentFile(parse(Segment, read_toml(Path(path)), path), Path(path)) for path in paths]
    by_name: dict[str, Path] = {}
    for segment, path in files:
        if segment.name in by_name:
            raise TrailvecError(f"{path} and {by_name[segment.name]} both say name = {segment.name!r}: rename one")
        by_name[segment.name] = path
        if segment.seeds.file is not None and not (path.parent / segment.seeds.file).is_file():
            raise TrailvecError(f"{path}: the seed list {path.parent / segment.seeds.file} does not exist: add it")
    return files


def rank_by_likeness(users: DataFrame, seeds: DataFrame, *, block_rows: int, counts: tuple[int, int]) -> DataFrame:
    """Each user who is no seed, with the highest cosine to any seed.

    Args:
        users: user_id string, vector array<float>; seeds: user_id string, each once.
        counts: about how many users and how many seeds there are.

    Returns:
        user_id string, score float, from the most alike on.
    """
    seed_vectors = users.join(seeds, "user_id", "left_semi")
    others = users.join(seeds, "user_id", "left_anti")
    by_id = [F.col("user_id").alias("id"), F.col("vector")]
    scored = nearest(
        others.select(*by_id), seed_vectors.select(*by_id), 1, "cosine", block_rows=block_rows, counts=counts
    )
    return scored.select(F.col("source_id").alias("user_id"), "score").orderBy(F.desc("score"), "user_id")


def run(runtime: Runtime) -> None:
    files = read_segments(runtime.config.export.segments)
    manifests = {file.segment.name: runtime.exports / file.segment.name / "manifest.json" for file in files}
    if not runtime.forced and all(_fingerprint(path) == runtime.fingerprint for path in manifests.values()):
        runtime.report.skipped = True
        for name, path in manifests.items():
            runtime.report.rows_out[name] = json.loads(path.read_text(encoding="utf-8"))["counts"]["exported"]
        return
    for file in files:
        runtime.on_progress(f"segment {file.segment.name}")
        runtime.report.rows_out[file.segment.name] = _export(runtime, file)


def _export(runtime: Runtime, file: SegmentFile) -> int:
    segment, version = file.segment, runtime.current_model()
    protect = _hasher(_key()) if segment.user_ids == "hashed" else str
    of_model = runtime.read(USER_EMBEDDINGS).where(F.col("model_version") == version)
    as_of = of_model.agg(F.date_format(F.max("as_of"), "yyyy-MM-dd'T'HH:mm:ssX")).collect()[0][0]
    users = of_model.where(F.exists("vector", lambda x: x != 0)).select("user_id", "vector")
    seeds = _seeds(runtime, file).persist()
    given, known = seeds.count(), users.join(seeds, "user_id", "left_semi").count()
    candidates = users.join(seeds, "user_id", "left_anti").count()
    if not known:
        raise TrailvecError(
            f"{file.path}: none of its {given:,} seeds is a user with a vector of model {version}: "
            f"correct the seeds, or run `trailvec score_users` first"
        )
    block_rows = runtime.config.neighbours.block_rows
    ranked = rank_by_likeness(users, seeds, block_rows=block_rows, counts=(candidates, known))
    with published(runtime.exports / segment.name) as folder, small_batches(runtime.spark):
        rows = (
            (protect(row["user_id"]), row["score"], rank)
            for rank, row in enumerate(ranked.limit(segment.size).toLocalIterator(), start=1)
        )
        parts, scores = _write_parts(rows, folder, segment.columns)
        exported: int = sum(part["rows"] for part in parts)
        counts = {"seeds_given": given, "seeds_known": known, "seeds_unknown": given - known}
        manifest = {
            "segment": segment.model_dump(mode="json"),
            "model_version": version,
            "as_of": as_of,
            "counts": {**counts, "candidates": candidates, "exported": exported},
            "score": scores,
            "files": parts,
            "provenance": runtime.provenance(),
        }
        write_json(folder / "manifest.json", manifest)
    seeds.unpersist()
    return exported


def _seeds(runtime: Runtime, file: SegmentFile) -> DataFrame:
    """The seeds' ids, each once: user_id string."""
    seeds = file.segment.seeds
    if seeds.file is not None:
        seed_list = file.path.parent / seeds.file
        try:
            lines = seed_list.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise TrailvecError(
                f"the seed list {seed_list} is no UTF-8 text ({error.reason}): save it as such"
            ) from None
        ids = runtime.spark.createDataFrame(pd.DataFrame({"user_id": [line.strip() for line in lines]}, dtype="str"))
    else:
        assert seeds.sql is not None
        ids = query(runtime, seeds.sql)
        if "user_id" not in ids.columns:
            raise TrailvecError(
                f"{file.path}: the query of its seeds gives {', '.join(ids.columns)}: it needs a column user_id"
            )
    return ids.select(F.col("user_id").cast("string")).where("user_id <> ''").distinct()


def _write_parts(
    rows: Iterator[tuple[str, float, int]], folder: Path, columns: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Writes rows of (user_id, score, rank) to Parquet; what each file holds, and the range of the scores.

    There is always a first part, so that whoever loads an empty segment still finds its columns.
    """
    schema = pa.schema([(name, _COLUMNS[name]) for name in columns])
    parts: list[dict[str, Any]] = []
    highest: float | None = None
    lowest: float | None = None
    while (chunk := list(itertools.islice(rows, _ROWS_PER_FILE))) or not parts:
        by_name = dict(zip(_COLUMNS, zip(*chunk, strict=True) if chunk else ((), (), ()), strict=True))
        path = folder / f"part-{len(parts):05d}.parquet"
        pq.write_table(pa.table([by_name[field.name] for field in schema], schema=schema), path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        parts.append({"name": path.name, "rows": len(chunk), "bytes": path.stat().st_size, "sha256": digest})
        if chunk:
            highest, lowest = chunk[0][1] if highest is None else highest, chunk[-1][1]
    return parts, {"min": lowest, "max": highest}


def _key() -> bytes:
    key = os.environ.get(KEY, "")
    if not key:
        raise TrailvecError(f"the environment has no {KEY}, the key that user ids are hashed with: export {KEY}=...")
    return key.encode()


def _hasher(key: bytes) -> Callable[[str], str]:
    return lambda user_id: hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()


def _fingerprint(manifest: Path) -> str | None:
    if not manifest.exists():
        return None
    fingerprint: str = json.loads(manifest.read_text(encoding="utf-8"))["provenance"]["fingerprint"]
    return fingerprint


def _inputs(runtime: Runtime) -> dict[str, Any]:
    files = read_segments(runtime.config.export.segments)
    facts: dict[str, Any] = {
        "model_version": runtime.current_model(),
        "segments": [segment.model_dump(mode="json") for segment, _ in files],
        "seed_lists": [
            hashlib.sha256((path.parent / segment.seeds.file).read_bytes()).hexdigest()
            for segment, path in files
            if segment.seeds.file is not None
        ],
    }
    if any(segment.seeds.sql is not None for segment, _ in files):
        # A query may read any table.
        facts["tables"] = {t.name: runtime.latest_version(t) for t in TABLES if runtime.exists(t)}
    if any(segment.user_ids == "hashed" for segment, _ in files):
        # Another key makes other files. Only a hash of this mark goes on from here.
        facts["key"] = _hasher(_key())("which key is this?")
    return facts


STAGE = Stage(
    "export_segments",
    "the users most like a seed list, as files with a manifest",
    run,
    reads=(CURRENT_MODEL, USER_EMBEDDINGS),  # in this order: what is current is whole
    writes=(),
    settings=("export",),
    inputs=_inputs,
)


def main() -> None:
    stage_main("export_segments")


if __name__ == "__main__":
    main()
