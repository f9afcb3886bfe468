"""Who may be exported: lists of users, and a segment's rules about them.

Each list (seeds, consent, suppression, the export log) is read once, however many segments name it. All lists become
one frame with a bitmap per user: bit n ("mark" n) is set if list n contains the user. One join with it decides for all
segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial, reduce
from itertools import islice
from operator import and_
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.files import Place
from jobs.raw_records import named_column
from jobs.runtime import Runtime
from jobs.segment_files import Staging
from jobs.segments import Frequency, SegmentFile
from jobs.spark_session import shuffle_tasks
from jobs.sql import ask
from jobs.user_lists import TEXT_OR_WHOLE, as_ids, read_rows, read_users

Flags = npt.NDArray[np.bool_]

_BITS = 62  # marks per word: a bigint that stays non-negative
_TEXTS = "texts"  # subfolder of the staging, for users of all plain-text lists
_ROWS = pa.schema({"user_id": pa.string(), "mark": pa.int32()})
_BATCH = 100_000  # lines of a text list per batch


class Lists:
    """Lists of users, each read once, however many segments name it. A mark is a list's number."""

    def __init__(self, runtime: Runtime, staging: Staging) -> None:
        self._runtime, self._staging = runtime, staging
        self._marks: dict[str, int] = {}
        self._frames: list[DataFrame] = []
        (staging.local / _TEXTS).mkdir()
        self._write(iter(()), mark=-1)  # object stores have no empty folders

    def mark(self, name: str, read: Callable[[], DataFrame | Iterator[str]]) -> int:
        """The mark of the named list; a new list is read now.

        Args:
            read: returns user ids, or rows with user_id and optionally `holds`, boolean: one row with false takes the
                user off the list.
        """
        if name not in self._marks:
            self._marks[name] = len(self._marks)
            users = read()
            if isinstance(users, DataFrame):
                holds = F.col("holds") if "holds" in users.columns else F.lit(True)
                self._frames.append(
                    users.select("user_id", F.lit(self._marks[name]).alias("mark"), holds.alias("holds"))
                )
            else:
                self._write(users, self._marks[name])
        return self._marks[name]

    def marks(self, names: Sequence[str], read: Callable[[], DataFrame]) -> list[int]:
        """The marks of the lists of those names; new ones are read together, as one frame.

        Args:
            read: gives user_id and `list`, an index into `names`.
        """
        if names[0] not in self._marks:
            first = len(self._marks)
            self._marks |= {name: number for number, name in enumerate(names, first)}
            mark = (F.col("list") + first).alias("mark")
            self._frames.append(read().select("user_id", mark, F.lit(True).alias("holds")))
        return [self._marks[name] for name in names]

    def _write(self, users: Iterator[str], mark: int) -> None:
        """Writes the users into one folder for all text lists, so that Spark reads them at once: planning a hundred
        reads takes a while."""
        with pq.ParquetWriter(self._staging.local / _TEXTS / f"{mark}.parquet", _ROWS) as file:
            while ids := list(islice(users, _BATCH)):
                file.write_batch(pa.record_batch([ids, pa.repeat(pa.scalar(mark, pa.int32()), len(ids))], schema=_ROWS))

    @property
    def folder(self) -> Place:
        """For copies of the lists' files, if Spark's tasks need them."""
        return self._staging.shared / "lists"

    @property
    def words(self) -> list[str]:
        """The names of the columns that hold marks."""
        return [f"marks_{word}" for word in range(max(1, -(-len(self._marks) // _BITS)))]

    def bits(self, marks: Iterable[int]) -> list[int]:
        """The marks packed into words."""
        words = [0] * len(self.words)
        for mark in marks:
            words[mark // _BITS] |= 1 << mark % _BITS
        return words

    def of_users(self) -> DataFrame:
        """user_id string and `words`, bigint each: one row per user on any list."""
        texts = self._runtime.spark.read.parquet(self._staging.to_tasks(_TEXTS))
        frame = reduce(DataFrame.unionByName, self._frames, texts.withColumn("holds", F.lit(True)))
        # Integers, not arrays: Spark aggregates integers by hash, but allocates an array per row and needs a sort.
        bit = f"shiftleft(1L, mark % {_BITS})"
        words = []
        for word, name in enumerate(self.words):
            held, not_held = (
                F.bit_or(F.expr(f"IF({holds} AND mark DIV {_BITS} = {word}, {bit}, 0L)"))
                for holds in ("holds", "NOT holds")
            )
            words.append(held.bitwiseAND(F.bitwise_not(not_held)).alias(name))
        # Repartition first: hardly any user is twice in a partition, so aggregating before the shuffle saves nothing.
        # Into a fixed number of partitions, sorted: else Spark merges small ones, and each join with the persisted rows
        # shuffles and sorts all of them again.
        parts = frame.repartition(shuffle_tasks(self._runtime.spark), "user_id")
        return parts.groupBy("user_id").agg(*words).sortWithinPartitions("user_id")


def read_consents(runtime: Runtime, folder: Place) -> DataFrame:
    """user_id and one column per purpose, from export.consent; a user may have several rows. `folder`: as for
    `read_users`."""
    consent = runtime.config.export.consent
    assert consent is not None
    if consent.sql is not None:
        return ask(runtime, consent.sql, "export.consent.sql")
    return read_rows(runtime, Path(str(consent.file)), folder)


def consenting(consents: DataFrame, purpose: str, path: Path) -> DataFrame:
    """user_id, holds: each row's consent to the purpose. A user consents if all their rows do; NULL or blank is a no.

    Raises:
        TrailvecError: there is no such column, or it has a value that is neither yes nor no.
    """
    if missing := {"user_id", purpose} - set(consents.columns):
        raise TrailvecError(
            f"{path} requires consent {purpose!r}, but export.consent has no column {', '.join(sorted(missing))} "
            f"(found {', '.join(consents.columns)}): correct one of them"
        )
    consent, kind = named_column(purpose), consents.schema[purpose].dataType.simpleString()
    if kind not in ("boolean", *TEXT_OR_WHOLE):  # cast to boolean, NaN and any timestamp would be true
        raise TrailvecError(
            f"{path} requires consent {purpose!r}, but that column of export.consent has type {kind}: "
            f"write true or false"
        )
    if kind != "boolean":
        text = consent.cast("string")  # cast to boolean directly, -1 would be true; via text it is NULL
        consent = text.cast("boolean")
        if wrong := consents.where(consent.isNull() & text.rlike(r"\S")).select(text).first():
            raise TrailvecError(
                f"{path} requires consent {purpose!r}, but that column of export.consent contains {wrong[0]!r}: "
                f"write true or false"
            )
    return consents.select(as_ids(consents, "export.consent"), F.coalesce(consent, F.lit(False)).alias("holds"))


class Rule(NamedTuple):
    """Leaves out users who are on the list; with `required`, those who are not."""

    name: str
    mark: int
    required: bool = False


@dataclass(frozen=True)
class Rules:
    """A segment's rules.

    Attributes:
        everyone: the mark of the users with a vector; no one else is eligible.
        steps: in order of evaluation: a user is counted under the first rule that leaves them out.
        seeds: the mark of the segment's seeds.
        suppressing: the steps for lists in `suppress`.
        exported: for once, twice, … within the look-back days of `at_most`: the marks of users exported at least so
            often and, if the segment has a control group, of users held back by a segment of that group, which counts
            as an export. A user with any of the marks was.
    """

    everyone: int
    steps: tuple[Rule, ...]
    seeds: int | None
    suppressing: tuple[Rule, ...]
    exported: tuple[tuple[int, ...], ...]


def rules_of(
    runtime: Runtime,
    file: SegmentFile,
    lists: Lists,
    consents: DataFrame | None,
    *,
    everyone: int,
    log: DataFrame,
    logged_at: int | None,
    now: datetime,
    controlled: Mapping[str, Sequence[str]],
) -> Rules:
    """The rules of a segment; reads the lists that it names.

    Args:
        everyone: as in `Rules`.
        log: the rows of `exports` that count for an export first logged at `logged_at`.
        controlled: by control group of the run's segments with this limit, first logged at `logged_at`: the segments
            that hold back that group.
    """
    segment, path = file
    steps: list[Rule] = []
    seeds: int | None = None
    exported: list[tuple[int, ...]] = []
    if segment.seeds is not None:
        name = f"seeds {_named(segment.seeds, path)}"
        seeds = lists.mark(name, partial(read_users, runtime, segment.seeds, path, lists.folder))
        steps.append(Rule("seed", seeds))
    if segment.consent is not None:
        assert consents is not None
        mark = lists.mark(f"consent {segment.consent}", partial(consenting, consents, segment.consent, path))
        steps.append(Rule(f"no consent to {segment.consent}", mark, required=True))
    suppressing: list[Rule] = []
    queries = [users.sql for users in segment.suppress if users.sql is not None]
    for users in segment.suppress:
        name = f"list {_named(users, path)}"
        mark = lists.mark(name, partial(read_users, runtime, users, path, lists.folder))
        # Rules of one name would be counted as one.
        query = "a query" if len(queries) < 2 or users.sql is None else f"query {queries.index(users.sql) + 1}"
        suppressing.append(Rule(f"suppressed by {users.file or query}", mark))
    steps += suppressing
    if segment.at_most is not None:
        limit, since = segment.at_most, now.date() - timedelta(days=segment.at_most.days - 1)
        recent = log.where(F.to_date("exported_at") >= F.lit(since))
        counts, seen = _times_exported(recent), f"since {since}, logged at {logged_at}"
        for n in range(1, limit.exports + 1):
            mark = lists.mark(f"exported {n} times {seen}", partial(counts.where, F.col("count") >= n))
            exported.append((mark,))
        steps.append(Rule(limit_name(limit), mark))
        if segment.group is not None:
            # Otherwise they never drop out: each day they fill more places, outranking those not exported yet.
            names = [
                f"held back in {group}, and with that {n} of {limit.exports} times {seen}"
                for group in controlled
                for n in range(1, limit.exports + 1)
            ]
            marks = lists.marks(names, partial(_times_with_held_back, recent, controlled, limit.exports))
            own = marks[list(controlled).index(segment.group) * limit.exports :][: limit.exports]
            exported = [(*of_all, mark) for of_all, mark in zip(exported, own, strict=True)]
            steps.append(Rule(held_back_name(limit), own[-1]))
    return Rules(everyone, tuple(steps), seeds, tuple(suppressing), tuple(exported))


def _named(users: UserList, path: Path) -> str:
    """What tells a list from others, in whichever segment's file it is named."""
    return users.sql or str((path.parent / str(users.file)).resolve())


def _times_exported(log: DataFrame) -> DataFrame:
    """user_id, count: how often the user was exported."""
    return log.where(~F.col("is_control")).groupBy("user_id").count()


def _times_with_held_back(log: DataFrame, controlled: Mapping[str, Sequence[str]], limit: int) -> DataFrame:
    """user_id, list: which lists a user held back in a group of `controlled` is in. Each group has `limit` lists, in
    the order of `controlled`: users who were exported, or held back in it, at least once, twice, … `limit` times.
    """
    places = {name: place for place, names in enumerate(controlled.values()) for name in names}
    place = F.create_map(*[F.lit(each) for pair in places.items() for each in pair])[F.col("segment")]
    held_back = log.where(F.col("is_control") & F.col("segment").isin(*places)).groupBy("user_id", place.alias("place"))
    rows = held_back.agg(F.count("*").alias("held")).join(_times_exported(log), "user_id", "left")
    times = F.least(F.col("held") + F.coalesce("count", F.lit(0)), F.lit(limit)).cast("int")
    first = F.col("place") * limit
    return rows.select("user_id", F.explode(F.sequence(first, first + times - 1)).alias("list"))


def limit_name(limit: Frequency) -> str:
    return f"exported {limit.exports} times in {limit.days} days"


def held_back_name(limit: Frequency) -> str:
    return f"exported or held back {limit.exports} times in {limit.days} days"


def deciding(lists: Lists, rules: Rules) -> dict[str, int]:
    """The columns by which `allows` decides for a segment: its rules' marks as bits, forbidden_… and required_…."""
    columns: dict[str, int] = {}
    for kind, required in (("forbidden", False), ("required", True)):
        marks = [rule.mark for rule in rules.steps if rule.required == required]
        bits = lists.bits([*marks, rules.everyone] if required else marks)
        columns |= {f"{kind}_{number}": word for number, word in enumerate(bits)}
    return columns


def allows(lists: Lists) -> Column:
    """Whether a row's marks (`Lists.words`) have none of its forbidden_… bits and all of its required_… bits."""
    conditions = []
    for number, word in enumerate(lists.words):
        forbidden, required = F.col(f"forbidden_{number}"), F.col(f"required_{number}")
        conditions.append(F.col(word).bitwiseAND(forbidden) == 0)
        conditions.append(F.col(word).bitwiseAND(required) == required)
    return reduce(and_, conditions)


class Marked:
    """Rows with marks, and which of them a rule leaves out."""

    def __init__(self, words: npt.NDArray[np.int64]) -> None:
        """`words`: [rows, words], in the order of `Lists.words`."""
        self._words = words

    def has(self, mark: int) -> Flags:
        return np.asarray(self._words[:, mark // _BITS] >> (mark % _BITS) & 1, np.bool_)

    def left_out(self, rules: Rules) -> list[tuple[str, Flags]]:
        """Each rule's name and the rows that it is the first to leave out."""
        remaining, by_rule = np.ones(len(self._words), np.bool_), []
        for rule in rules.steps:
            out = remaining & (self.has(rule.mark) != rule.required)
            by_rule.append((rule.name, out))
            remaining &= ~out
        return by_rule

    def allowed(self, rules: Rules) -> Flags:
        out = [~self.has(rules.everyone), *(flags for _, flags in self.left_out(rules))]
        return np.asarray(~np.any(out, axis=0))

    def __getitem__(self, rows: Flags) -> Marked:
        return Marked(self._words[rows])


class Combinations(NamedTuple):
    """The combinations of marks that occur, and the number of `users` with each, [combinations]."""

    marked: Marked
    users: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.users.sum())

    def of(self, mark: int) -> Combinations:
        """The combinations that include the mark."""
        includes = self.marked.has(mark)
        return Combinations(self.marked[includes], self.users[includes])

    def of_nobody(self) -> Combinations:
        nobody = np.zeros(len(self.users), np.bool_)
        return Combinations(self.marked[nobody], self.users[nobody])
