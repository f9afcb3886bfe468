"""export_segments: user_embeddings (and what the segments' lists and queries read) → files of each segment, exports.

A segment is a small TOML file (keys: jobs/segments.py; examples: conf/segments/). All segments of a run share two reads
of the vectors; jobs/segment_members.py selects the members.

A segment's folder holds its parts, report.html and manifest.json. It replaces the last export only when it is complete
(for a `destination` on an object store, the manifest is deleted first and written last). The same input gives the same
bytes. Before anything is published, the members are logged in `exports`, under an id derived from all that the export
depends on: after a kill between the two, the same command finds them there and logs nothing twice.

How user ids and texts that look like formulas are written: jobs/segment_files.py.

trailvec export_segments --conf conf/local.toml
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import functions as F

from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.files import write_json
from jobs.runtime import Runtime, Stage, code_version, digest
from jobs.segment_files import (
    MANIFEST,
    REPORT,
    Staging,
    check_destinations,
    check_place,
    delivered,
    destination_of,
    export_key,
    open_destination,
    read_manifest,
    remove_replaced_export,
    staging_area,
    write_parts,
)
from jobs.segment_members import Export, Selection, Taken
from jobs.segment_report import Share, page
from jobs.segments import SegmentFile, VectorKind, read_segments
from jobs.sql import UNSEEN, ask, names_the_time, sources_of
from jobs.tables import (
    CURRENT_MODEL,
    EXPORTS,
    ITEM_EMBEDDINGS,
    ITEMS,
    SESSIONS,
    TABLES,
    USER_EMBEDDINGS,
    USER_PROFILES,
    of_model,
)
from jobs.user_lists import file_digest
from spark_udfs.keyed import key_mark

# A segment's keys that change neither its members nor who gets them under which ids.
_LOOKS: dict[str, Any] = dict.fromkeys(("owner", "purpose", "approved_by", "format", "columns", "rows_per_file"), True)
_LOOKS |= {"suppress": {"__all__": {"may_be_empty"}}}
_BINS = 20  # of the histogram of scores
_WRITERS = 2  # threads: while one hashes ids (the GIL allows only one), the other compresses a file


# ---- which exports, and which of them exist already -----------------------------------------------------------------


def _exports(runtime: Runtime, now: datetime) -> list[Export]:
    """The configured segments as exports, in the order of `read_segments`."""
    files = read_segments(runtime.config.export.segments)
    if any(file.segment.needs_key for file in files):
        export_key()  # fails early: it is first needed after all queries
    version = runtime.current_model()
    if any(file.segment.affinity is not None for file in files):
        for table in (ITEMS, ITEM_EMBEDDINGS):
            runtime.pin(table)
    if runtime.exists(USER_PROFILES):
        runtime.pin(USER_PROFILES)
    # Those pinned above, or by the stage, are read at these very versions, whatever is committed meanwhile.
    states = {t.name: runtime.state(t) for t in TABLES if t != EXPORTS and runtime.exists(t)}
    digest_of, answers = cache(file_digest), dict[str, tuple[set[str], bool]]()  # many segments name the same lists

    def reads(text: str, where: str) -> tuple[set[str], bool]:
        if text not in answers:
            answers[text] = _reads(runtime, text, where)
        return answers[text]

    with_profiles = USER_PROFILES.name in states and not of_model(runtime.read(USER_PROFILES), version).isEmpty()
    if not with_profiles:
        _tell_of_profiles(runtime, files, version)
    check_destinations(runtime, files)
    found: dict[str, Export] = {}
    for number, file in enumerate(files):
        others = [found[name].id for name in file.segment.others]
        facts = {"model_version": version, "others": others} | _facts(
            runtime, file, states, now, digest_of=digest_of, reads=reads
        )
        vectors: VectorKind = "embedding"
        if file.segment.seeds is not None:
            vectors = file.segment.seeds.vectors or ("profile" if with_profiles else "embedding")
        if vectors == "profile":
            if not with_profiles:
                raise TrailvecError(
                    f"{file.path} compares users by user_profiles, which has no row of model {version}: run `trailvec "
                    f'profile_users --set model.version={version}` first, or set seeds.vectors = "embedding"'
                )
            facts["profiles"] = states[USER_PROFILES.name]
        found[file.segment.name] = Export(number, file.segment, file.path, vectors, digest(facts)[:32])
    return list(found.values())


def _tell_of_profiles(runtime: Runtime, files: list[SegmentFile], version: str) -> None:
    """Adds a note on lookalikes that use embeddings only because the model has no profiles: after each training, until
    `profile_users` has run."""
    open_ones = [f.segment.name for f in files if f.segment.seeds is not None and f.segment.seeds.vectors is None]
    if open_ones:
        runtime.report.notes.append(
            f"user_profiles has no row of model {version}, so users are compared by user_embeddings, which finds fewer "
            f"of the users sought, in {', '.join(open_ones)}: run `trailvec profile_users --set "
            f"model.version={version}`, then `trailvec export_segments` again, or set seeds.vectors"
        )


def _facts(
    runtime: Runtime,
    file: SegmentFile,
    states: dict[str, tuple[str | None, int]],
    now: datetime,
    *,
    digest_of: Callable[[Path], str],
    reads: Callable[[str, str], tuple[set[str], bool]],
) -> dict[str, Any]:
    """What else determines an export's members, as plain values. Not the code: new code must not log members again.

    Args:
        states: `Runtime.state` of all tables but `exports`.
        digest_of, reads: `file_digest` and `_reads`.
    """
    segment, consent = file.segment, runtime.config.export.consent
    facts: dict[str, Any] = {
        # Correcting how it looks must not make another export: `at_most` would count the first one. Plain instead of
        # hashed ids, or another destination, do: who got them, or what they say about people, is another matter.
        "segment": segment.model_dump(mode="json", exclude=_LOOKS),
        "users": states[USER_EMBEDDINGS.name],
        "files": [digest_of(file.path.parent / users.file) for users in segment.lists if users.file is not None],
    }
    if segment.consent is not None:
        if consent is None:
            raise TrailvecError(
                f"{file.path} requires consent {segment.consent!r}, but export.consent is missing: set it to the file "
                f"or query that says who gave it"
            )
        facts["consent"] = consent.sql or digest_of(Path(str(consent.file)))
    if segment.affinity is not None:
        facts["items"] = {t.name: states[t.name] for t in (ITEMS, ITEM_EMBEDDINGS)}
    queries = [(segment.sql, "its sql"), *((users.sql, "the query of a list of its users") for users in segment.lists)]
    named_queries = [(text, f"{file.path}: {name}") for text, name in queries if text]
    if segment.consent is not None and consent is not None and consent.sql is not None:
        named_queries.append((consent.sql, "export.consent.sql"))
    answers = [reads(*query) for query in named_queries]
    if answers:
        names = UNSEEN.union(*(read for read, _ in answers))
        facts["tables"] = {name: state for name, state in states.items() if name in names}
    if segment.needs_key:
        # Another key gives other files. Only a hash of this mark leaves this module.
        facts["key"] = key_mark(export_key())
    if segment.at_most is not None or any(timely for _, timely in answers):
        facts["day"] = now.date().isoformat()
    return facts


def _reads(runtime: Runtime, text: str, where: str) -> tuple[set[str], bool]:
    """The names of trailvec's tables that a query reads, and whether it may give another answer tomorrow though these
    stay: it names the time, or reads a table that is not trailvec's, whose version is not part of an export's id.

    Raises:
        TrailvecError: the query reads `exports`: each export would change the next one, and an export made again after
            its members were logged would select others. Or it reads files. Or as `ask`.
    """
    answer = ask(runtime, text, where)
    reads = sources_of(runtime, answer)
    if EXPORTS.name in reads.tables:
        raise TrailvecError(
            f"{where} reads exports, to which this export adds its own members: use at_most or exclude, or write the "
            f"users to a file and name that instead"
        )
    if reads.files is not None:
        raise TrailvecError(
            f"{where} reads the files {reads.files}, whose changes go unnoticed: name them as a list (file = ...), or "
            f"load them into a table"
        )
    return reads.tables, reads.others or names_the_time(text, answer)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _published(runtime: Runtime, export: Export) -> dict[str, Any] | None:
    """The manifest, if this very export is published already, as its file says and by this code."""
    text = read_manifest(open_destination(runtime, export.segment))
    if text is None:
        return None
    try:
        manifest: dict[str, Any] = json.loads(text)
        same = (manifest["export_id"], manifest["provenance"]["code_version"]) == (export.id, code_version())
        same = same and manifest["segment"] == export.segment.model_dump(mode="json")
    except (ValueError, LookupError, TypeError):  # damaged, or not an export's
        return None
    return manifest if same else None


def _pending(runtime: Runtime, exports: list[Export], manifests: dict[str, dict[str, Any] | None]) -> list[Export]:
    """The exports not published yet, and any that one of them includes or excludes and whose members the log does not
    match: it keeps those that other code selected under the same id, and loses those older than `maintain.keep_days`.

    Args:
        manifests: by segment, what `_published` returned.
    """
    runtime.create(EXPORTS)
    others = {name for export in exports for name in export.segment.others}
    published = [export.id for export in exports if manifests[export.name] is not None and export.name in others]
    counts = runtime.latest(EXPORTS).where(F.col("export_id").isin(published)).groupBy("export_id").count().collect()
    logged = {row["export_id"]: row["count"] for row in counts}
    named: set[str] = set()
    pending: list[Export] = []
    for export in reversed(exports):  # each comes after those that it names
        manifest = manifests[export.name]
        members = 0 if manifest is None else manifest["counts"]["exported"] + manifest["counts"]["control"]
        if manifest is None or (export.name in named and logged.get(export.id, 0) != members):
            pending.append(export)
            named.update(export.segment.others)
    return pending[::-1]


# ---- the log, the files ---------------------------------------------------------------------------------------------


def _publish(runtime: Runtime, chosen: Selection, staging: Staging, now: datetime) -> None:
    """Logs the members, then puts each segment's files in place. Threads write the files meanwhile: the log is Spark's
    work, the files are the driver's."""
    for export in chosen.pending:
        check_place(open_destination(runtime, export.segment))
    with ExitStack() as stack:
        writers = ThreadPoolExecutor(_WRITERS)
        stack.callback(writers.shutdown, cancel_futures=True)
        parts = {e.name: writers.submit(_write_parts, staging, e, chosen.taken[e.name]) for e in chosen.pending}
        _log_members(runtime, chosen, staging, now)
        overlaps, verticals = _overlaps(chosen), _verticals(runtime, chosen, staging)
        kinds = {export.vectors for export in chosen.pending}
        if "profile" in kinds:
            kinds.add("embedding")
        as_of = {kind: chosen.as_of(kind) for kind in kinds}
        if "profile" in kinds:
            chosen.note_old_profiles(as_of)
        for export in chosen.pending:
            taken, segment, files = chosen.taken[export.name], export.segment, parts[export.name].result()
            manifest = {
                "segment": segment.model_dump(mode="json"),
                "export_id": export.id,
                "model_version": chosen.version,
                "vectors": export.vectors if segment.scored else None,
                "as_of": as_of[export.vectors],
                "counts": taken.counts,
                "score": _spread(taken.scores[~taken.control]) if segment.scored else None,
                "files": files,
                "provenance": _provenance(runtime),
            }
            with delivered(open_destination(runtime, segment), staging.local) as folder:
                for file in files:
                    shutil.move(staging.parts_of(export.name) / file["name"], folder)
                report = page(manifest, taken.scores, overlaps[export.name], verticals[export.name])
                (folder / REPORT).write_text(report, encoding="utf-8")
                write_json(folder / MANIFEST, manifest)
            runtime.report.rows_out[export.name] = taken.counts["exported"]


def _provenance(runtime: Runtime) -> dict[str, Any]:
    """What is the same wherever and whenever the same export is made; the rest is in the commit to `exports`, and so is
    the rest of the configuration, whose test accounts and queries may name people: recipients need not know them."""
    provenance = {key: value for key, value in runtime.provenance().items() if key not in ("user", "application")}
    config = provenance["config"]
    export = {key: value for key, value in config["export"].items() if key != "consent"}
    provenance["config"] = {"export": export, "model": config["model"]}
    return provenance | {"reads": {table.name: runtime.changed_version(table) for table in STAGE.reads}}


def _write_parts(staging: Staging, export: Export, taken: Taken) -> list[dict[str, Any]]:
    folder, exported = staging.parts_of(export.name), ~taken.control
    folder.mkdir(parents=True)
    scores = taken.scores[exported] if export.segment.scored else None
    return write_parts(folder, export.segment, taken.ids.filter(pa.array(exported)), scores)


def _log_members(runtime: Runtime, chosen: Selection, staging: Staging, now: datetime) -> None:
    """Logs all members in one commit, but for those already logged by a run that was killed before it published. (Other
    code may select other members for the same export: these are added.)"""
    folder = staging.local / "log"
    folder.mkdir()
    staging.check()  # two concurrent runs would log members twice
    # Not `chosen.log`: an older run may have logged them since, just before its staging was removed.
    logged = runtime.latest(EXPORTS).where(F.col("export_id").isin([export.id for export in chosen.pending]))
    is_new = logged.isEmpty()
    for export in chosen.pending:
        taken = chosen.taken[export.name]
        count = len(taken.ids)
        columns = {
            "export_id": _repeated(export.id, count),
            "segment": _repeated(export.name, count),
            "user_id": taken.ids,
            "is_control": pa.array(taken.control),
            "exported_at": pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), count),
            "model_version": _repeated(chosen.version, count),
            "destination": _repeated(destination_of(runtime, export.segment), count),
        }
        # (Not user_id: it has no repeated values, so a dictionary only costs.)
        same = ["export_id", "segment", "model_version", "destination"]
        pq.write_table(pa.table(columns), folder / f"{export.number:05d}.parquet", use_dictionary=same)
    rows = runtime.spark.read.parquet(staging.to_tasks("log"))
    if not is_new:
        rows = rows.join(logged, ["export_id", "user_id"], "left_anti")
    if is_new or not rows.isEmpty():
        runtime.append(EXPORTS, rows)


def _repeated(text: str, count: int) -> pa.Array:
    """The text `count` times, a byte each: as plain strings, those of 60 million rows would not fit into an array."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), count), [text])


def _overlaps(chosen: Selection) -> dict[str, list[Share]]:
    """By segment: the share of its members that each of the other segments exports (not: only holds back) too."""
    from scipy.sparse import csr_matrix  # noqa: PLC0415 - a fraction of a second, and only this needs it

    names = [export.name for export in chosen.exports]
    members, control = zip(*map(chosen.members_and_control, names), strict=True)
    users = pa.concat_arrays(members).dictionary_encode().indices.to_numpy()
    starts = np.cumsum([0, *map(len, members)])
    exported, shape = ~np.concatenate(control), (len(names), users.max(initial=-1) + 1)
    holds = csr_matrix((np.ones(len(users), np.int64), users, starts), shape=shape)
    exports = csr_matrix((exported.astype(np.int64), users, starts), shape=shape)
    common = (holds @ exports.T).toarray()
    return {
        name: [
            Share(other, common[row, column] / max(len(members[row]), 1), None)
            for column, other in enumerate(names)
            if column != row
        ]
        for row, name in enumerate(names)
    }


def _verticals(runtime: Runtime, chosen: Selection, staging: Staging) -> dict[str, list[Share] | None]:
    """By segment: the share of its members, and of everyone, who acted in each vertical."""
    if not runtime.exists(SESSIONS):
        return {name: None for name in chosen.taken}
    members = runtime.spark.read.parquet(str(staging.shared / "log")).select("segment", "user_id")
    everyone = chosen.users.select(F.lit("").alias("segment"), "user_id")  # no segment has that name
    acted = runtime.latest(SESSIONS).select("user_id", F.explode("verticals").alias("vertical")).distinct()
    found = members.unionByName(everyone).join(acted, "user_id").groupBy("segment", "vertical").count().collect()
    users = {(row["segment"], row["vertical"]): row["count"] for row in found}
    verticals = sorted({vertical for _, vertical in users})
    return {
        name: [
            Share(v, users.get((name, v), 0) / max(len(taken.ids), 1), users.get(("", v), 0) / chosen.everyone.total)
            for v in verticals
        ]
        for name, taken in chosen.taken.items()
    }


def _spread(scores: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Range and histogram of scores that are sorted in descending order."""
    if not len(scores):
        return {"min": None, "max": None, "histogram": None}
    counts, edges = np.histogram(scores.astype(np.float64), _BINS)
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {"min": float(scores[-1]), "max": float(scores[0]), "histogram": histogram}


# ---- the stage ------------------------------------------------------------------------------------------------------


def run(runtime: Runtime) -> None:
    now = _now()
    exports = _exports(runtime, now)
    manifests = {export.name: None if runtime.forced else _published(runtime, export) for export in exports}
    for export in exports:
        if (manifest := manifests[export.name]) is not None:
            runtime.report.rows_out[export.name] = manifest["counts"]["exported"]
            remove_replaced_export(open_destination(runtime, export.segment))
    if all(manifests.values()):
        runtime.report.skipped = True
        return
    pending = _pending(runtime, exports, manifests)
    with staging_area(runtime) as staging:
        chosen = Selection(runtime, exports, pending, staging, now)
        chosen.select()
        _publish(runtime, chosen, staging, now)


STAGE = Stage(
    "export_segments",
    "write the users of each segment to files, with a manifest and a report",
    run,
    reads=(CURRENT_MODEL, USER_EMBEDDINGS),  # in this order: a current model's vectors are complete
    writes=(),  # the manifests, not `exports`, say whether the stage is up to date
    settings=("export",),
    also="It also writes files and the table exports, and reads the lists, the tables that queries name and, if "
    "needed, user_profiles, items, item_embeddings and sessions.",
)


def main() -> None:
    stage_main("export_segments")


if __name__ == "__main__":
    main()
