"""Selects the members of all segments of a run, in two reads of each kind of vectors (spark_udfs/likeness.py).

The first read takes the seeds and a hash sample of users (a list of more than 20,000 seeds takes another, to count
them); the second scores everybody. For a segment of the best `size` users, it returns users above a score floor, which
is estimated a little too low from the sample. If it was still too high, that segment's pass is repeated with a lower
floor. So the result is exact, and independent of partitioning: ties go to the smaller user id. Spark drops users whom a
list rules out (jobs/segment_rules.py). The driver sorts the rest, somewhat more than the members of all segments, and
takes the best.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.errors import TrailvecError
from jobs.models import stacked
from jobs.runtime import Runtime
from jobs.segment_files import Staging, held_back, texts, tied
from jobs.segment_rules import (
    Combinations,
    Flags,
    Lists,
    Marked,
    Rules,
    allows,
    deciding,
    held_back_name,
    limit_name,
    read_consents,
    rules_of,
)
from jobs.segments import Affinity, Frequency, Seeds, Segment, SegmentFile, VectorKind
from jobs.spark_session import collect_sorted, persisted
from jobs.sql import ask
from jobs.tables import EXPORTS, ITEM_EMBEDDINGS, ITEMS, USER_EMBEDDINGS, USER_PROFILES, of_model
from jobs.user_lists import ids_of
from spark_udfs.likeness import Anchors, Scorer, anchors_of, candidates
from training.stores import remove_tree

_SAMPLE = 50_000  # approximate number of users whose scores set the floors: the larger, the fewer needless candidates
_SEEDS = 20_000  # per segment, vectors sent to the driver: of more seeds, a hash sample of about this size
_ITEMS = 20_000  # per affinity, vectors sent to the driver and to every task: of more items, the most popular ones
_IDS = pa.large_string()  # a pyarrow string array is limited to 2 GiB: some 60 million ids
_NO_DATE = "(a date that Spark can't parse is NULL)"  # a reason why a query may return no user
_OLD_PROFILES = 7  # days by which profiles may be older than the newest of the embeddings without a note
_SHOWN = 5  # ids or names in a note or message
_OTHERS = 5_000  # negative examples of a classifier: it fits only some 64 weights


@dataclass(frozen=True)
class Export:
    """One segment of the run.

    Attributes:
        number: its position in the run's order; identifies it in Spark frames.
        vectors: which of the users' vectors it is scored by, if it is scored.
        id: a hash of everything that determines its members; in the log and in the manifest.
    """

    number: int
    segment: Segment
    path: Path
    vectors: VectorKind
    id: str

    @property
    def name(self) -> str:
        return self.segment.name


class Candidates(NamedTuple):
    """Candidate members of a segment.

    Attributes:
        ids: large_string; shared with other segments, so it has their candidates too.
        scores: float32 [ids]; 0 for segments without scores.
        marks: int64 [ids, words]; empty if no segment of the run has `at_most`.
        rows: indices of the segment's own candidates.
    """

    ids: pa.Array
    scores: npt.NDArray[np.float32]
    marks: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    def best_first(self) -> npt.NDArray[np.int64]:
        """`rows` by descending score; ties by id."""
        order = self.rows[np.argsort(-self.scores[self.rows])]
        places = tied(self.scores[order])
        if len(places):
            keys = pa.table({"score": self.scores[order[places]], "id": self.ids.take(pa.array(order[places]))})
            by_id = pc.sort_indices(keys, [("score", "descending"), ("id", "ascending")]).to_numpy()
            order[places] = order[places][by_id]
        return order


_NOBODY = Candidates(pa.array([], _IDS), np.empty(0, np.float32), np.empty((0, 1), np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class Taken:
    """The members of a segment, by descending score, or by id if it has no scores.

    Attributes:
        ids: the users, large_string.
        scores: float32 [members]; empty if the segment has no scores.
        control: bool [members]: in the control group.
        counts: as in the manifest.
    """

    ids: pa.Array
    scores: npt.NDArray[np.float32]
    control: Flags
    counts: dict[str, Any]


@dataclass
class _Work:
    """What a run finds out about one segment, in this order.

    Attributes:
        rules: who may be exported.
        initial: the combinations of marks of those whom the segment's query returns or who are members of the segments
            that it includes, with a vector or without; not for segments with scores.
        seeds, items: counts, as in the manifest; empty if the segment has none.
        anchors: what users are compared with.
        sample: scores of the allowed users in the sample, descending, float32.
        floor: the score that candidates reach.
        candidates: those who reach it, or whom its query or an included segment names, and whom its rules allow.
    """

    rules: Rules
    initial: Combinations
    seeds: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    anchors: Anchors = field(init=False)
    sample: npt.NDArray[np.float32] = field(init=False)
    floor: float = field(init=False)
    candidates: Candidates = _NOBODY


class LookedUp(NamedTuple):
    """The users whose vectors are sent to the driver: seeds and a hash sample of everyone.

    Attributes:
        rows: their words of marks, is_cold, sampled, and draw, a hash by which seeds are drawn.
        vectors: float32 [users, width]; none is zero.
        marked: their marks.
    """

    rows: pd.DataFrame
    vectors: npt.NDArray[np.float32]
    marked: Marked

    @property
    def sampled(self) -> Flags:
        return self.rows["sampled"].to_numpy(np.bool_)


class Selection:
    """Selects the members of the segments that are not exported yet.

    Attributes:
        exports, pending: all configured segments, in run order; those to be exported now.
        version: of the model.
        users: user_id, vector, is_cold of everyone with a vector; `everyone`: their combinations of marks.
        log: the table `exports` as it was before this run.
        taken: results of `select`, by segment name.
    """

    def __init__(
        self, runtime: Runtime, exports: list[Export], pending: list[Export], staging: Staging, now: datetime
    ) -> None:
        self._runtime, self._staging, self.exports, self.pending = runtime, staging, exports, pending
        self.version = runtime.current_model()
        self.users = self._of_model("embedding").select("user_id", "vector", "is_cold")
        self.log = runtime.at(EXPORTS, runtime.latest_version(EXPORTS))
        self._logged_at = self._first_logged()
        self._holders = defaultdict[str | None, list[str]](list)  # by control group: the segments that hold it back
        for export in exports:
            self._holders[export.segment.group].append(export.name)
        lists = Lists(runtime, staging)
        consents = read_consents(runtime, lists.folder) if any(e.segment.consent for e in pending) else None
        self._has_vector = lists.mark("users", lambda: self.users)
        by_profile = [export.name for export in pending if export.vectors == "profile"]
        has_profile = lists.mark("profiles", lambda: self._of_model("profile")) if by_profile else None
        rules = {
            export.number: rules_of(
                runtime,
                SegmentFile(export.segment, export.path),
                lists,
                consents,
                everyone=self._has_vector,
                log=self._counting(self._logged_at.get(export.id)),
                logged_at=self._logged_at.get(export.id),
                now=now,
                controlled=self._groups_like(export),
            )
            for export in pending
        }
        self._lists, self._marks = lists, lists.of_users().persist()
        runtime.on_progress("who may be exported")
        self._listed = self._combinations(self._marks)
        self.everyone = self._listed.of(self._has_vector)
        self._work = {number: _Work(of, self.everyone.of_nobody()) for number, of in rules.items()}
        self._refuse_empty_lists()
        self._note_nobody()
        self._with: dict[VectorKind, Combinations] = {"embedding": self.everyone}  # those who have that kind of vector
        if has_profile is not None:
            self._with["profile"] = self.everyone.of(has_profile)
            self._note_without_profile(by_profile)
        self.taken: dict[str, Taken] = {}
        # By time of first logging (None: never), then by user: the number of segments so far; `_held` by group, too.
        self._exported: defaultdict[int | None, Counter[str]] = defaultdict(Counter)
        self._held: defaultdict[tuple[int | None, str | None], Counter[str]] = defaultdict(Counter)

    def _refuse_empty_lists(self) -> None:
        """Raises TrailvecError if a suppression list that must not be empty is: a query with a mistyped date, or a file
        cut short, would export everyone who should be left out."""
        for export in self.pending:
            suppressing = self._work[export.number].rules.suppressing
            for users, rule in zip(export.segment.suppress, suppressing, strict=True):
                if not users.may_be_empty and not self._listed.of(rule.mark).total:
                    by_query = f" {_NO_DATE}" if users.sql is not None else ""
                    raise TrailvecError(
                        f"{export.path}: no user at all is {rule.name}{by_query}: correct that list, or write "
                        f"may_be_empty = true beside it"
                    )

    def _note_nobody(self) -> None:
        """Notes lists that look wrong: if a suppression list matches no known user, its ids may be written unlike those
        of the events; if nobody consents, the query or file may have a mistake."""
        notes, consent = self._runtime.report.notes, self._runtime.config.export.consent
        lists = {
            rule.mark: (export.path, rule, rule in self._work[export.number].rules.suppressing)
            for export in reversed(self.pending)  # the first segment that names the list is reported
            for rule in self._work[export.number].rules.steps
        }
        for mark, (path, rule, suppresses) in sorted(lists.items()):
            listed, known = self._listed.of(mark).total, self.everyone.of(mark).total
            if rule.required and not listed:
                by_query = f" {_NO_DATE}" if consent is not None and consent.sql else ""
                notes.append(f"{path}: {rule.name} from any user, so nobody is exported{by_query}")
            elif suppresses and listed and not known:
                notes.append(
                    f"{rule.name}: none of its {listed:,} users has a vector, so it leaves nobody out; are its ids "
                    f"written as in the events?"
                )

    def _note_without_profile(self, segments: list[str]) -> None:
        """A note on users newer than the last run of `profile_users`: no segment that uses profiles can hold them."""
        without = self.everyone.total - self._with["profile"].total
        if without:
            self._runtime.report.notes.append(
                f"{without:,} of {self.everyone.total:,} users have no row in user_profiles (new since "
                f"profile_users last ran), so {', '.join(segments)} can't contain them: run `trailvec profile_users "
                f"--set model.version={self.version}`, then `trailvec export_segments` again"
            )

    def select(self) -> None:
        """Selects the members of each segment."""
        runtime = self._runtime
        scored = [export for export in self.pending if export.segment.scored]
        queried = [export for export in self.pending if export.segment.sql is not None]
        rows: list[DataFrame] = []
        with ExitStack() as until_kept:
            if queried:
                runtime.on_progress("the users that queries return")
                # Else they would run twice, the second time perhaps on tables that have changed since. Persisted one by
                # one, because Spark takes a union of unions apart and would not find the inner one.
                rows += [until_kept.enter_context(persisted(self._queried_users(export))) for export in queried]
                self._count(reduce(DataFrame.unionByName, rows))
                for export in queried:
                    if not self._work[export.number].initial.of(self._has_vector).total:
                        runtime.report.notes.append(f"{export.path}: its sql returns no user with a vector {_NO_DATE}")
            if scored:
                runtime.on_progress("the seeds and a sample")
                for vectors in sorted({export.vectors for export in scored}):
                    self._look_up(vectors, [export for export in scored if export.vectors == vectors])
                for export in scored:
                    self._work[export.number].floor = self._floor(export, self._needed(export))
                rows.append(self._pass(scored))
            runtime.on_progress(f"the scores of {len(scored)} segments")
            if rows:
                self._keep_allowed(reduce(DataFrame.unionByName, rows))
        limited = {self._logged_at.get(e.id) for e in self.pending if e.segment.at_most is not None}
        for export in self.exports:
            if export in self.pending:
                runtime.on_progress(f"segment {export.name}")
                self.taken[export.name] = self._take(export)
            if (logged_at := self._logged_at.get(export.id)) in limited:
                ids, control = self.members_and_control(export.name)
                self._exported[logged_at].update(texts(ids.filter(pa.array(~control))))
                self._held[logged_at, export.segment.group].update(texts(ids.filter(pa.array(control))))
        self._marks.unpersist()

    def as_of(self, kind: VectorKind) -> str:
        """The latest `as_of` of the vectors of that kind, ISO 8601: they know events before it."""
        # The microseconds too: it is one after the newest event.
        newest = F.date_format(F.max("as_of"), "yyyy-MM-dd'T'HH:mm:ss.SSSSSSX")
        return str(self._of_model(kind).agg(newest).collect()[0][0])

    def note_old_profiles(self, as_of: dict[VectorKind, str]) -> None:
        """A note if the profiles are much older than the embeddings: no nightly job renews them.

        Args:
            as_of: of both kinds.
        """
        if not self.everyone.total:  # then there is no such time
            return
        behind = (datetime.fromisoformat(as_of["embedding"]) - datetime.fromisoformat(as_of["profile"])).days
        if behind > _OLD_PROFILES:
            names = ", ".join(export.name for export in self.pending if export.vectors == "profile")
            self._runtime.report.notes.append(
                f"user_profiles knows nothing of the last {behind:,} days (profile_users last ran at the log's end of "
                f"{as_of['profile'][:10]}), so {names} may miss users who have changed: run `trailvec profile_users "
                f"--set model.version={self.version}`, then `trailvec export_segments` again"
            )

    # ---- Spark: candidates

    def _of_model(self, kind: VectorKind) -> DataFrame:
        """The current model's rows in the table of that kind of vectors."""
        return of_model(self._runtime.read(USER_EMBEDDINGS if kind == "embedding" else USER_PROFILES), self.version)

    def _first_logged(self) -> dict[str, int]:
        """By export id, when the export was first logged, in microseconds; only exports that ever were.

        An export with `at_most` that is repeated (by --force, by other code, or because its files are gone) is made as
        of that time, because its id is of that day: otherwise it would take other users. Exports logged at the same
        time are taken in run order.
        """
        if all(export.segment.at_most is None for export in self.pending):  # not needed
            return {}
        rows = self.log.where(F.col("export_id").isin([export.id for export in self.exports]))
        times = rows.groupBy("export_id").agg(F.unix_micros(F.min("exported_at")).alias("at")).collect()
        return {row["export_id"]: row["at"] for row in times}

    def _counting(self, logged_at: int | None) -> DataFrame:
        """The rows of the log that count for an export first logged at that time.

        Among exports logged at the very same time, `select` itself counts those of segments earlier in the run.
        Segments that no longer exist count too, since their position in the run is unknown.
        """
        if logged_at is None:
            return self.log
        at, known = F.unix_micros("exported_at"), F.col("export_id").isin([export.id for export in self.exports])
        return self.log.where((at < logged_at) | ((at == logged_at) & ~known))

    def _groups_like(self, export: Export) -> dict[str, list[str]]:
        """The control groups of the pending segments for which the same rows of the log count, and the segments that
        hold back each; none where nothing counts."""
        if export.segment.at_most is None:
            return {}

        def looks_at(other: Export) -> tuple[Frequency | None, int | None]:
            return other.segment.at_most, self._logged_at.get(other.id)

        groups = {other.segment.group: None for other in self.pending if looks_at(other) == looks_at(export)}
        return {group: self._holders[group] for group in groups if group}

    def _queried_users(self, export: Export) -> DataFrame:
        """The users that a segment's query returns: segment, user_id, score (NULL)."""
        where = f"{export.path}: its sql"
        return _without_score(export, ids_of(ask(self._runtime, str(export.segment.sql), where), where).distinct())

    def _marked(self, rows: DataFrame) -> DataFrame:
        """The rows with their users' marks joined on, as words."""
        none = F.lit(0).cast("bigint")
        words = {word: F.coalesce(word, none) for word in self._lists.words}
        return rows.join(self._marks, "user_id", "left").withColumns(words)

    def _combinations(self, marked: DataFrame) -> Combinations:
        found = marked.groupBy(*self._lists.words).count().toPandas()
        return Combinations(Marked(found[self._lists.words].to_numpy()), found["count"].to_numpy())

    def _count(self, rows: DataFrame) -> None:
        """Sets what segments begin with: `rows` (segment, user_id)."""
        words = self._lists.words
        found = self._marked(rows.select("segment", "user_id")).groupBy("segment", *words).count().toPandas()
        for number, part in found.groupby("segment"):
            combinations = Combinations(Marked(part[words].to_numpy()), part["count"].to_numpy())
            self._work[int(str(number))].initial = combinations

    def _vectors(self, kind: VectorKind) -> DataFrame:
        """user_id, vector, is_cold: the vectors by which users are compared."""
        if kind == "embedding":
            return self.users
        # No profile counts as cold: it holds more than the items that the model knows.
        return self._of_model(kind).select("user_id", "vector", F.lit(False).alias("is_cold"))

    def _look_up(self, kind: VectorKind, scored: list[Export]) -> None:
        """Sets the anchors of the segments scored by one kind of vectors, and the scores of a sample of users."""
        marks = [mark for export in scored if (mark := self._work[export.number].rules.seeds) is not None]
        one_in = {mark: -(-self.everyone.of(mark).total // _SEEDS) or 1 for mark in marks}
        looked_up = self._seeds_and_sample(kind, one_in)
        all_drawn = set(one_in.values()) <= {1}
        self._count_seeds(scored, looked_up.rows.assign(users=1) if all_drawn else self._seed_counts(kind, marks))
        of_items = self._item_anchors([export for export in scored if export.segment.affinity is not None])
        for export in scored:
            seeds, work = export.segment.seeds, self._work[export.number]
            work.anchors = (
                of_items[export.number] if seeds is None else self._seed_anchors(export, seeds, looked_up, one_in)
            )
        # Of the seeds, of which there may be millions in all, only those in the sample are scored.
        vectors, marked = looked_up.vectors[looked_up.sampled], looked_up.marked[looked_up.sampled]
        scores = Scorer([self._work[export.number].anchors for export in scored]).approximate(vectors)
        for export, of_export in zip(scored, scores, strict=True):
            work = self._work[export.number]
            work.sample = np.sort(of_export[marked.allowed(work.rules)])[::-1]

    def _seeds_and_sample(self, kind: VectorKind, one_in: dict[int, int]) -> LookedUp:
        """Seeds and a sample of everyone; of each mark of seeds one in so many is drawn."""
        draw, words = F.xxhash64("user_id"), self._lists.words
        sampled = F.pmod(draw, F.lit(max(1, self.everyone.total // _SAMPLE))) == 0
        some = [
            self._has_any([mark for mark, of in one_in.items() if of == n]) & (F.pmod(draw, F.lit(n)) == 0)
            for n in sorted(set(one_in.values()))
        ]
        seeds = self._marks.where(reduce(operator.or_, some, F.lit(False)) & self._has_any([self._has_vector]))
        seeds = seeds.select("user_id", F.lit(True).alias("is_seed"))
        chosen = self._vectors(kind).withColumn("sampled", sampled).join(F.broadcast(seeds), "user_id", "left")
        chosen = chosen.where("sampled OR is_seed").withColumn("draw", draw)
        rows = collect_sorted(self._marked(chosen), "user_id")
        vectors, marks = stacked(rows["vector"]), rows[words].to_numpy()
        # Drop zero vectors and profiles of users who have lost their vector since: neither seeds nor candidates.
        usable = vectors.any(axis=1) & Marked(marks).has(self._has_vector)
        return LookedUp(rows[usable], vectors[usable], Marked(marks[usable]))

    def _seed_anchors(self, export: Export, seeds: Seeds, looked_up: LookedUp, one_in: dict[int, int]) -> Anchors:
        """The anchors of a segment with seeds; adds how many of these are used to their counts."""
        work = self._work[export.number]
        assert work.rules.seeds is not None
        is_seed = looked_up.marked.has(work.rules.seeds)
        others = looked_up.vectors[looked_up.sampled & ~is_seed]
        # The rows include those that other segments look up. Cold seeds tell nothing about tastes.
        cold = looked_up.rows["is_cold"].to_numpy(np.bool_)
        drawn = looked_up.rows["draw"] % one_in[work.rules.seeds] == 0
        used = is_seed & ~cold & drawn.to_numpy()
        work.seeds["used"] = int(used.sum())
        self._refuse_seeds(export)
        return anchors_of(
            seeds.method, looked_up.vectors[used], others[:: -(-len(others) // _OTHERS) or 1], seeds.tastes
        )

    def _has_any(self, marks: list[int]) -> Column:
        """Whether a row has any of these marks."""
        bits = zip(self._lists.words, self._lists.bits(marks), strict=True)
        return reduce(operator.or_, (F.col(word).bitwiseAND(F.lit(bit)) != 0 for word, bit in bits))

    def _seed_counts(self, kind: VectorKind, marks: list[int]) -> pd.DataFrame:
        """Counts users (non-zero vector, any of `marks`) by combination of marks and is_cold."""
        known = self._vectors(kind).where(F.exists("vector", lambda value: value != 0))
        seeds = self._marks.where(self._has_any(marks) & self._has_any([self._has_vector]))
        marked = known.join(seeds, "user_id")
        return marked.groupBy(*self._lists.words, "is_cold").agg(F.count("*").alias("users")).toPandas()

    def _count_seeds(self, scored: list[Export], seed_counts: pd.DataFrame) -> None:
        """Counts each segment's known and cold seeds; `seed_counts`: `users` by marks and is_cold, of all seeds."""
        marked, cold = Marked(seed_counts[self._lists.words].to_numpy()), seed_counts["is_cold"].to_numpy(np.bool_)
        users = seed_counts["users"].to_numpy()
        for export in scored:
            if (mark := self._work[export.number].rules.seeds) is not None:
                seed, given = marked.has(mark), self._listed.of(mark).total
                known, of_cold = int(users[seed].sum()), int(users[seed & cold].sum())
                count = {"given": given, "known": known, "cold": of_cold, "unknown": given - known}
                self._work[export.number].seeds = count

    def _refuse_seeds(self, export: Export) -> None:
        count = self._work[export.number].seeds
        stage = (USER_EMBEDDINGS if export.vectors == "embedding" else USER_PROFILES).stage
        if not count["given"]:
            raise TrailvecError(f"{export.path}: its list of seeds is empty: correct it")
        if not count["known"]:
            raise TrailvecError(
                f"{export.path}: none of its {count['given']:,} seeds has a vector of model "
                f"{self.version} (are their ids written as in the events?): correct the seeds, or run "
                f"`trailvec {stage} --set model.version={self.version}` first"
            )
        if not count["used"]:
            drawn = "" if count["cold"] == count["known"] else ", and the sample of its seeds holds no other"
            raise TrailvecError(
                f"{export.path}: {count['cold']:,} of its {count['known']:,} seeds are cold (model {self.version} "
                f"knows none of their items){drawn}: use other seeds, or train a newer model"
            )

    def _item_anchors(self, exports: list[Export]) -> dict[int, Anchors]:
        """The vectors of the segments' affinity items, in one read, except for segments with more than _ITEMS items."""
        if not exports:
            return {}
        conditions = {export.number: _matches(export.segment.affinity) for export in exports if export.segment.affinity}
        items, vectors_of = (self._runtime.read(table) for table in (ITEMS, ITEM_EMBEDDINGS))
        attributes = items.select("item_id", "vertical", "category", "event_count")
        described = of_model(vectors_of, self.version).join(attributes, "item_id", "left")
        flags = [F.coalesce(condition, F.lit(False)).alias(f"of_{number}") for number, condition in conditions.items()]
        rows = described.select("item_id", "vector", F.coalesce("event_count", F.lit(0)).alias("events"), *flags)
        counts = rows.agg(*[F.count_if(f"of_{number}").alias(str(number)) for number in conditions]).collect()[0]
        few = [F.col(f"of_{number}") for number in conditions if counts[str(number)] <= _ITEMS]
        collected = collect_sorted(rows.where(reduce(operator.or_, few, F.lit(False))), "item_id")
        anchors = {}
        for export in exports:
            count, of_export = counts[str(export.number)], f"of_{export.number}"
            if count <= _ITEMS:
                used = collected[collected[of_export]]
            else:
                best = rows.where(of_export).orderBy(F.desc("events"), "item_id").limit(_ITEMS)
                used = collect_sorted(best.select("item_id", "vector"), "item_id")
            vectors, affinity = used["vector"].tolist(), export.segment.affinity
            listed = set(affinity.items) if affinity is not None else set()
            if listed or count > _ITEMS:
                self._work[export.number].items = {"named": len(listed) or count, "used": len(vectors)}
            if not vectors:
                _refuse_unknown_names(export, items)
                raise TrailvecError(
                    f"{export.path}: no item of its affinity has a vector of model {self.version}: correct the items, "
                    f"or run `trailvec embed_items` first"
                )
            if count <= _ITEMS and (missing := sorted(listed - set(used["item_id"]))):
                some = ", ".join([*missing[:_SHOWN], *["..."] * (len(missing) > _SHOWN)])
                self._runtime.report.notes.append(
                    f"{export.path}: {len(missing):,} of the {len(listed):,} items of its affinity have no vector of "
                    f"model {self.version} ({some}); are their ids written as in the events?"
                )
            anchors[export.number] = Anchors(np.stack(vectors), "dot")
        return anchors

    def _floor(self, export: Export, needed: int) -> float:
        """A score that, very probably, at least `needed` allowed users reach."""
        if export.segment.threshold is not None:
            return export.segment.threshold
        work, of_kind = self._work[export.number], self._with[export.vectors]
        allowed = int(of_kind.users[of_kind.marked.allowed(work.rules)].sum())
        expected = needed / max(allowed, 1) * len(work.sample)
        place = int(expected + 4 * np.sqrt(expected) + 4)
        return float(work.sample[place]) if place < len(work.sample) else -np.inf

    def _needed(self, export: Export) -> int:
        """How many allowed users suffice, unless `at_most` or an excluded segment without `size` removes many."""
        others = (other.segment.size or 0 for other in self.exports if other.name in export.segment.exclude)
        return (export.segment.size or 0) + sum(others)

    def _pass(self, exports: list[Export]) -> DataFrame:
        passes = []
        for kind in sorted({export.vectors for export in exports}):
            of_kind = {export.number: self._work[export.number] for export in exports if export.vectors == kind}
            anchors = {number: work.anchors for number, work in of_kind.items()}
            floors = {number: work.floor for number, work in of_kind.items()}
            passes.append(candidates(self._vectors(kind), anchors, floors))
        return reduce(DataFrame.unionByName, passes)

    def _keep_allowed(self, rows: DataFrame) -> None:
        """Sets segments' candidates: those of `rows` (segment, user_id, score) that their rules allow."""
        limited = any(export.segment.at_most is not None for export in self.pending)
        words = self._lists.words if limited else []  # only `_too_often` looks at them again
        bits = {number: deciding(self._lists, work.rules) for number, work in self._work.items()}
        schema = ", ".join(["segment int", *(f"{name} bigint" for name in next(iter(bits.values())))])
        by_segment = self._runtime.spark.createDataFrame([(n, *of.values()) for n, of in bits.items()], schema)
        # Join the segments' bits after the shuffle, to keep it small.
        allowed = self._marked(rows).join(F.broadcast(by_segment), "segment").where(allows(self._lists))
        remove_tree(self._staging.shared / "candidates")
        allowed.select("segment", "user_id", "score", *words).write.parquet(str(self._staging.shared / "candidates"))
        found = ds.dataset(self._staging.from_tasks("candidates"), format="parquet").to_table()
        segments = found["segment"].to_numpy()
        ids, scores = found["user_id"].cast(_IDS).combine_chunks(), pc.fill_null(found["score"], 0.0).to_numpy()
        marks = np.array([found[word].to_numpy() for word in words], np.int64).T
        for number, of_segment in _rows_of(segments).items():
            self._work[number].candidates = Candidates(ids, scores, marks, of_segment)

    # ---- driver: members

    def _take(self, export: Export) -> Taken:
        if export.segment.include:
            ids = pa.chunked_array([self.members(name) for name in export.segment.include], _IDS).unique()
            frame = self._runtime.spark.createDataFrame(pd.DataFrame({"user_id": ids.to_pandas()}), "user_id string")
            rows = _without_score(export, frame)
            self._count(rows)
            self._keep_allowed(rows)
        needed = self._needed(export)
        while (taken := self._walk(export)) is None:
            # Members of excluded segments without `size` are only known by now.
            others = (export.segment.size or 0) + sum(len(self.members(name)) for name in export.segment.exclude)
            needed = others if others > needed else 4 * needed
            self._work[export.number].floor = self._floor(export, needed)
            self._keep_allowed(self._pass([export]))
        return taken

    def _walk(self, export: Export) -> Taken | None:
        """The segment's members among its candidates; None if too few, while there may be more below the floor."""
        segment, work = export.segment, self._work[export.number]
        found = work.candidates
        rows = found.best_first()
        if segment.at_most is None and not segment.exclude:  # none of the best drops out, so no other moves up
            rows = rows[: segment.size]
        ids, scores = found.ids.take(pa.array(rows)), found.scores[rows]
        by_exports, too_often = self._too_often(export, ids, found.marks, rows)
        is_excluded = np.zeros(len(rows), np.bool_)
        if segment.exclude:
            excluded = pa.concat_arrays([self.members(name) for name in segment.exclude])
            is_excluded = pc.is_in(ids, value_set=excluded).to_numpy(zero_copy_only=False) & ~too_often
        kept, seen = np.flatnonzero(~too_often & ~is_excluded), len(rows)
        if segment.size is not None and len(kept) >= segment.size:
            kept = kept[: segment.size]
            seen = kept[-1] + 1  # counts end with the last member
        elif segment.size is not None and work.floor > -np.inf:
            return None
        members = ids.take(pa.array(kept))
        control = held_back(segment, members)
        dropped = {}
        if segment.at_most is not None:
            dropped[limit_name(segment.at_most)] = by_exports
            if segment.group is not None:
                dropped[held_back_name(segment.at_most)] = too_often & ~by_exports
        if segment.exclude:
            dropped[f"member of {', '.join(segment.exclude)}"] = is_excluded
        out = {name: int(flags[:seen].sum()) for name, flags in dropped.items()}
        counts = self._counts_of(export, len(members), int(control.sum()), out)
        return Taken(members, scores[kept] if segment.scored else np.empty(0, np.float32), control, counts)

    def _too_often(
        self, export: Export, ids: pa.Array, marks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> tuple[Flags, Flags]:
        """Which of `ids` (marks at `rows`) reach the limit by earlier segments of this run together with the log: by
        exports alone, and with the times they were held back. Spark has already dropped those who reach it by the log
        alone."""
        limit, logged_at = export.segment.at_most, self._logged_at.get(export.id)
        exported = self._exported[logged_at]
        held = self._held[logged_at, export.segment.group]  # nobody if the segment has no group
        if limit is None or not (exported or held) or not len(ids):
            return np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        marked, users, lists = Marked(marks[rows]), texts(ids), self._work[export.number].rules.exported

        def reached(kinds: int, of_run: npt.NDArray[np.int64]) -> Flags:
            """By `of_run`, the times in this run, and the first `kinds` lists of each number of times."""
            logged = sum(np.any([marked.has(mark) for mark in of[:kinds]], axis=0).astype(np.int64) for of in lists)
            return np.asarray((of_run > 0) & (of_run + logged >= limit.exports))

        exports = np.array([exported[user] for user in users], np.int64)
        with_held = exports + np.array([held[user] for user in users], np.int64) if held else exports
        return reached(1, exports), reached(2, with_held)

    def _counts_of(self, export: Export, members: int, control: int, dropped: dict[str, int]) -> dict[str, Any]:
        """The manifest's counts. `dropped`: users who left the candidates, by rule."""
        segment, work = export.segment, self._work[export.number]
        initial = self.everyone if segment.scored else work.initial
        known, total = initial.of(self._has_vector), initial.total
        removed: Counter[str] = Counter()  # in rule order
        if not segment.scored:  # users new since the last scoring, or flagged; included members may have lost theirs
            removed["no vector"] = total - known.total
        for name, out in known.marked.left_out(work.rules):
            removed[name] += int(known.users[out].sum())
        for name, users in dropped.items():
            removed[name] += users
        if segment.scored:
            # Users with a zero vector have no likeness, and rank after all others.
            cut = (
                f"after the best {segment.size:,}" if segment.size is not None else f"score below {segment.threshold:g}"
            )
            removed[cut] = total - sum(removed.values()) - members
        steps = [{"rule": rule, "users": count} for rule, count in removed.items()]
        counts = {"in": total, "removed": steps, "control": control, "exported": members - control}
        for name, figures in (("seeds", work.seeds), ("items", work.items)):
            counts |= {name: figures} if figures else {}
        return counts

    def members(self, name: str) -> pa.Array:
        """The members of a configured segment: as just selected or, if this run doesn't export it, from the log."""
        return self.members_and_control(name)[0]

    def members_and_control(self, name: str) -> tuple[pa.Array, Flags]:
        """As `members`, with flags of who is held back."""
        if name in self.taken:
            return self.taken[name].ids, self.taken[name].control
        ids, control, rows = self._logged
        (export,) = (export for export in self.exports if export.name == name)
        of_export = rows.get(export.number, _NOBODY.rows)
        return ids.take(pa.array(of_export)), control[of_export]

    @cached_property
    def _logged(self) -> tuple[pa.Array, Flags, dict[int, npt.NDArray[np.int64]]]:
        """The logged members of segments that this run doesn't export: users, who is held back, and row indices by
        segment. One filtered read for all, because the log may be far larger."""
        numbers = {export.id: export.number for export in self.exports if export not in self.pending}
        rows = self.log.where(F.col("export_id").isin(list(numbers)))
        rows.select("export_id", "user_id", "is_control").write.parquet(str(self._staging.shared / "members"))
        found = ds.dataset(self._staging.from_tasks("members"), format="parquet").to_table()
        named = found["export_id"].dictionary_encode().combine_chunks()
        of_names = np.array([numbers[name] for name in named.dictionary.to_pylist()], np.int64)
        ids = found["user_id"].cast(_IDS).combine_chunks()
        return ids, found["is_control"].to_numpy(), _rows_of(of_names[named.indices.to_numpy()])


def _rows_of(segments: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
    """Row indices by segment; `segments`: each row's segment."""
    counts = np.bincount(segments)
    narrow = segments.astype(np.min_scalar_type(len(counts)))  # up to 16 bits numpy sorts by radix
    parts = np.split(np.argsort(narrow, kind="stable"), np.cumsum(counts)[:-1])
    return {number: part for number, part in enumerate(parts) if len(part)}


def _without_score(export: Export, ids: DataFrame) -> DataFrame:
    return ids.select(F.lit(export.number).alias("segment"), "user_id", F.lit(None).cast("float").alias("score"))


def _refuse_unknown_names(export: Export, items: DataFrame) -> None:
    """Raises TrailvecError if no item is in the vertical, or none in the category, that the segment's affinity names;
    the message shows those with the nearest names. `items`: vertical, category."""
    affinity, within = export.segment.affinity, ""
    assert affinity is not None
    for kind, wanted in (("vertical", affinity.vertical), ("category", affinity.category)):
        if wanted is None:
            continue
        others, items = items.where(F.col(kind).isNotNull()), items.where(F.col(kind) == wanted)
        if items.isEmpty():
            distance = F.levenshtein(F.lower(kind), F.lower(F.lit(wanted)))
            nearest = others.select(kind).distinct().orderBy(distance, kind).limit(_SHOWN).collect()
            names = ", ".join(repr(row[0]) for row in nearest)
            raise TrailvecError(
                f"{export.path}: no item{within} is in {kind} {wanted!r} (the nearest names: {names or 'none'}): "
                f"correct it"
            )
        within = f" of {kind} {wanted!r}"


def _matches(affinity: Affinity) -> Column:
    """Whether an item (item_id, vertical, category) matches the affinity."""
    if affinity.items:
        return F.col("item_id").isin(list(affinity.items))
    same = F.lit(True)
    if affinity.vertical is not None:
        same &= F.col("vertical") == affinity.vertical
    if affinity.category is not None:
        same &= F.col("category") == affinity.category
    return same
