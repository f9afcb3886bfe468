"""Who may be exported: lists of users, and the rules that a segment makes of them.

Every list (seeds, consent, suppression, the log of exports) is read once, however many segments name it, and all become
one frame: for each user the numbers ("marks") of the lists that hold them, as bits. One join of it decides about all
segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial, reduce
from itertools import chain, islice
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
from jobs.sql import ask
from jobs.user_lists import TEXT_OR_WHOLE, as_ids, read_rows, read_users

Flags = npt.NDArray[np.bool_]

_BITS = 62  # marks in one word: a bigint, and no sign
_TEXTS = "texts"  # in the staging: the users of all lists that are texts
_ROWS = pa.schema({"user_id": pa.string(), "mark": pa.int32()})
_BATCH = 100_000  # lines of a text at once


class Lists:
    """Lists of users, each read once however many segments name it. A mark is a list's number."""

    def __init__(self, runtime: Runtime, staging: Staging) -> None:
        self._runtime, self._staging = runtime, staging
        self._marks: dict[str, int] = {}
        self._frames: list[DataFrame] = []
        (staging.local / _TEXTS).mkdir()
        self._write(iter(()), mark=-1)  # a folder without any file is none in an object store

    def mark(self, name: str, read: Callable[[], DataFrame | Iterator[str]]) -> int:
        """The mark of the list of that name, which is read now where it is new.

        Args:
            read: gives user ids, or rows with a user_id and maybe `holds`, boolean: a list doesn't hold a user of whom
                a row says so.
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

    def _write(self, users: Iterator[str], mark: int) -> None:
        """Beside the other texts: Spark reads all at once, as a hundred files each apart take a while to plan."""
        with pq.ParquetWriter(self._staging.local / _TEXTS / f"{mark}.parquet", _ROWS) as file:
            while ids := list(islice(users, _BATCH)):
                file.write_batch(pa.record_batch([ids, pa.repeat(pa.scalar(mark, pa.int32()), len(ids))], schema=_ROWS))

    @property
    def folder(self) -> Place:
        """For copies of the lists' files, where Spark's tasks need one."""
        return self._staging.shared / "lists"

    @property
    def words(self) -> list[str]:
        """The columns that hold marks."""
        return [f"marks_{word}" for word in range(max(1, -(-len(self._marks) // _BITS)))]

    def bits(self, marks: Iterable[int]) -> list[int]:
        """Marks as the words of a row."""
        words = [0] * len(self.words)
        for mark in marks:
            words[mark // _BITS] |= 1 << mark % _BITS
        return words

    def of_users(self) -> DataFrame:
        """user_id string, and `words`, bigint each: a row for each user of any list."""
        texts = self._runtime.spark.read.parquet(self._staging.to_tasks(_TEXTS))
        frame = reduce(DataFrame.unionByName, self._frames, texts.withColumn("holds", F.lit(True)))
        # No arrays: Spark makes each row's apart, and sorts rows for it. Whole numbers it hashes and compares.
        bit = f"shiftleft(1L, mark % {_BITS})"
        words = []
        for word, name in enumerate(self.words):
            said, denied = (
                F.bit_or(F.expr(f"IF({holds} AND mark DIV {_BITS} = {word}, {bit}, 0L)"))
                for holds in ("holds", "NOT holds")
            )
            words.append(said.bitwiseAND(F.bitwise_not(denied)).alias(name))
        # Hardly a user is twice in one part of a list: to gather them before the shuffle costs, and spares nothing.
        return frame.repartition("user_id").groupBy("user_id").agg(*words)


def _read_suppressed(runtime: Runtime, users: UserList, path: Path, folder: Place) -> DataFrame | Iterator[str]:
    """As `read_users`; a file of nobody is refused, since all who should be in it would be exported."""
    found = read_users(runtime, users, path, folder)
    if users.file is None:
        return found
    if isinstance(found, DataFrame):
        if not found.isEmpty():
            return found
    elif (first := next(found, None)) is not None:
        return chain([first], found)
    raise TrailvecError(
        f"{path}: the list {path.parent / users.file} in suppress holds no user id: correct it, or leave it out"
    )


def read_consents(runtime: Runtime, folder: Place) -> DataFrame:
    """user_id and a column for each purpose, as export.consent says; a user may have several rows. `folder`: as for
    `read_users`."""
    consent = runtime.config.export.consent
    assert consent is not None
    if consent.sql is not None:
        return ask(runtime, consent.sql, "export.consent.sql")
    return read_rows(runtime, Path(str(consent.file)), folder)


def consenting(consents: DataFrame, purpose: str, path: Path) -> DataFrame:
    """user_id, holds: what each row says of the purpose. A user all of whose rows say yes agrees.

    Raises:
        TrailvecError: there is no such column, or it says something that is neither yes nor no.
    """
    if missing := {"user_id", purpose} - set(consents.columns):
        raise TrailvecError(
            f"{path} asks for the consent {purpose!r}: export.consent has no column {', '.join(sorted(missing))} "
            f"(found {', '.join(consents.columns)}): correct one of them"
        )
    said, kind = named_column(purpose), consents.schema[purpose].dataType.simpleString()
    if kind not in ("boolean", *TEXT_OR_WHOLE):  # as a boolean NaN is true, and so is any time
        raise TrailvecError(
            f"{path} asks for the consent {purpose!r}: that column of export.consent is of type {kind}: "
            f"write true or false"
        )
    if kind != "boolean":
        text = said.cast("string")  # as a boolean -1 is true, the text is nothing
        said = text.cast("boolean")
        if wrong := consents.where(said.isNull() & text.rlike(r"\S")).select(text).first():
            raise TrailvecError(
                f"{path} asks for the consent {purpose!r}: export.consent says {wrong[0]!r} of somebody: "
                f"write true or false"
            )
    return consents.select(as_ids(consents, "export.consent"), F.coalesce(said, F.lit(False)).alias("holds"))


class Rule(NamedTuple):
    """A user who is in the list (`required`: who is not) is left out."""

    name: str
    mark: int
    required: bool = False


@dataclass(frozen=True)
class Rules:
    """What decides about a user of a segment.

    Attributes:
        everyone: the mark of the users with a vector; nobody else comes into question.
        steps: in the order in which they are looked at: the first one that leaves a user out is the one that counts.
        seeds: the mark of its seeds.
        suppressing: those of the steps that are lists in `suppress`.
        exported: the marks of those who were exported once, twice, … within the days that the segment looks back.
    """

    everyone: int
    steps: tuple[Rule, ...]
    seeds: int | None
    suppressing: tuple[Rule, ...]
    exported: tuple[int, ...]


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
) -> Rules:
    """The rules of a segment; the lists that it names are read.

    Args:
        everyone: as in `Rules`.
        log: the rows of `exports` that count for what was first logged at `logged_at`.
    """
    segment, path = file
    steps: list[Rule] = []
    seeds: int | None = None
    exported: list[int] = []
    if segment.seeds is not None:
        seeds = lists.mark(f"seeds of {segment.name}", partial(read_users, runtime, segment.seeds, path, lists.folder))
        steps.append(Rule("seed", seeds))
    if segment.consent is not None:
        assert consents is not None
        mark = lists.mark(f"consent {segment.consent}", partial(consenting, consents, segment.consent, path))
        steps.append(Rule(f"no consent to {segment.consent}", mark, required=True))
    suppressing: list[Rule] = []
    for users in segment.suppress:
        name = f"list {users.sql or (path.parent / str(users.file)).resolve()}"
        mark = lists.mark(name, partial(_read_suppressed, runtime, users, path, lists.folder))
        suppressing.append(Rule(f"suppressed by {users.file or 'a query'}", mark))
    steps += suppressing
    if segment.at_most is not None:
        limit, since = segment.at_most, now.date() - timedelta(days=segment.at_most.days - 1)
        recent = log.where(F.to_date("exported_at") >= F.lit(since))
        counts = recent.where(~F.col("is_control")).groupBy("user_id").count()
        for n in range(1, limit.exports + 1):
            name = f"exported {n} times since {since}, logged at {logged_at}"
            exported.append(lists.mark(name, partial(counts.where, F.col("count") >= n)))
        steps.append(Rule(limit_name(limit), exported[-1]))
        if segment.control_share:
            # Else they never leave: day after day they take more of the places, and are likelier than who is exported.
            own = recent.where(F.col("is_control") & (F.col("segment") == segment.name)).groupBy("user_id").count()
            name = f"held back of {segment.name} since {since}, logged at {logged_at}"
            mark = lists.mark(name, partial(own.where, F.col("count") >= limit.exports))
            steps.append(Rule(f"held back {limit.exports} times in {limit.days} days", mark))
    return Rules(everyone, tuple(steps), seeds, tuple(suppressing), tuple(exported))


def limit_name(limit: Frequency) -> str:
    return f"exported {limit.exports} times in {limit.days} days"


def deciding(lists: Lists, rules: Rules) -> dict[str, int]:
    """The columns by which `allows` decides for a segment: forbidden_… and required_…, the bits of its rules' lists."""
    columns: dict[str, int] = {}
    for kind, required in (("forbidden", False), ("required", True)):
        marks = [rule.mark for rule in rules.steps if rule.required == required]
        bits = lists.bits([*marks, rules.everyone] if required else marks)
        columns |= {f"{kind}_{number}": word for number, word in enumerate(bits)}
    return columns


def allows(lists: Lists) -> Column:
    """Whether a row's marks (of `Lists.words`) have none of its bits forbidden_…, and all of its required_…."""
    conditions = []
    for number, word in enumerate(lists.words):
        forbidden, required = F.col(f"forbidden_{number}"), F.col(f"required_{number}")
        conditions.append(F.col(word).bitwiseAND(forbidden) == 0)
        conditions.append(F.col(word).bitwiseAND(required) == required)
    return reduce(and_, conditions)


class Marked:
    """Rows that have marks: which of them a rule leaves out."""

    def __init__(self, words: npt.NDArray[np.int64]) -> None:
        """`words`: [rows, words], as `Lists.words` says."""
        self._words = words

    def has(self, mark: int) -> Flags:
        return np.asarray(self._words[:, mark // _BITS] >> (mark % _BITS) & 1, np.bool_)

    def left_out(self, rules: Rules) -> list[tuple[str, Flags]]:
        """Each rule's name with the rows that it leaves out, and none before it did."""
        left, found = np.ones(len(self._words), np.bool_), []
        for rule in rules.steps:
            out = left & (self.has(rule.mark) != rule.required)
            found.append((rule.name, out))
            left &= ~out
        return found

    def allowed(self, rules: Rules) -> Flags:
        out = [~self.has(rules.everyone), *(flags for _, flags in self.left_out(rules))]
        return np.asarray(~np.any(out, axis=0))

    def __getitem__(self, rows: Flags) -> Marked:
        return Marked(self._words[rows])


class Combinations(NamedTuple):
    """The combinations of marks that some users have, and how many `users` have each, [combinations]."""

    marked: Marked
    users: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.users.sum())

    def of(self, mark: int) -> Combinations:
        """Those with the mark."""
        there = self.marked.has(mark)
        return Combinations(self.marked[there], self.users[there])

    def of_nobody(self) -> Combinations:
        nobody = np.zeros(len(self.users), np.bool_)
        return Combinations(self.marked[nobody], self.users[nobody])
