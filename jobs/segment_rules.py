"""Who may be exported: lists of users, and the rules that a segment makes of them.

Every list (seeds, consent, suppression, the log of exports) is read once, however many segments name it, and all become
one frame: for each user the numbers ("marks") of the lists that hold them, as bits. One join of it decides about all
segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial, reduce
from operator import and_
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.config import UserList
from jobs.errors import TrailvecError
from jobs.runtime import Runtime
from jobs.segments import Frequency, SegmentFile
from jobs.sql import ask
from training.urls import file_url

Flags = npt.NDArray[np.bool_]

_CSV = (".csv", ".csv.gz")
_BITS = 62  # marks in one word: a bigint, and no sign


class Lists:
    """Lists of users, each read once however many segments name it. A mark is a list's number."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._marks: dict[str, int] = {}
        self._texts: list[pd.DataFrame] = []
        self._frames: list[DataFrame] = []

    def mark(self, name: str, read: Callable[[], DataFrame | list[str]]) -> int:
        """The mark of the list of that name, which is read now where it is new.

        Args:
            read: gives user ids, or rows with a user_id and maybe `holds`, boolean: a list doesn't hold a user of whom
                a row says so.
        """
        if name not in self._marks:
            self._marks[name] = len(self._marks)
            users = read()
            if isinstance(users, list):
                self._texts.append(pd.DataFrame({"user_id": pd.Series(users, dtype="str"), "mark": self._marks[name]}))
            else:
                holds = F.col("holds") if "holds" in users.columns else F.lit(True)
                self._frames.append(
                    users.select("user_id", F.lit(self._marks[name]).alias("mark"), holds.alias("holds"))
                )
        return self._marks[name]

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
        texts = pd.concat([pd.DataFrame({"user_id": [], "mark": []}), *self._texts])
        frame = self._runtime.spark.createDataFrame(
            texts.astype({"user_id": "object", "mark": "int32"}), "user_id string, mark int"
        ).withColumn("holds", F.lit(True))
        frame = reduce(DataFrame.unionByName, self._frames, frame)
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


def read_users(runtime: Runtime, users: UserList, path: Path) -> DataFrame | list[str]:
    """The users of a list that the segment's file at `path` names: ids, or a column user_id, not empty."""
    if users.sql is not None:
        where = f"{path}: the query of a list of its users"
        frame = ask(runtime, users.sql, where)
    else:
        file = path.parent / str(users.file)
        if not file.name.lower().endswith((*_CSV, ".parquet")):
            return _read_lines(file)
        frame, where = _read_rows(runtime, file), f"{path}: the list {file}"
    if "user_id" not in frame.columns:
        raise TrailvecError(f"{where} gives {', '.join(frame.columns) or 'nothing'}: it needs a column user_id")
    return frame.select(F.col("user_id").cast("string")).where("user_id <> ''")


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TrailvecError(f"the list {file} is no UTF-8 text ({error.reason}): save it as such") from None
    return [line.strip() for line in lines if line.strip()]


def _read_rows(runtime: Runtime, file: Path) -> DataFrame:
    """CSV with a header, or Parquet."""
    url = file_url(str(file))  # a path alone Spark would look for in Hadoop's default file system
    if file.name.lower().endswith(_CSV):
        return runtime.spark.read.csv(url, header=True, escape='"')
    return runtime.spark.read.parquet(url)


def _read_suppressed(runtime: Runtime, users: UserList, path: Path) -> DataFrame | list[str]:
    """As `read_users`; a file of nobody is refused, since all who should be in it would be exported."""
    found = read_users(runtime, users, path)
    if users.file is not None and (not found if isinstance(found, list) else found.isEmpty()):
        raise TrailvecError(
            f"{path}: the list {path.parent / users.file} in suppress holds no user id: correct it, or leave it out"
        )
    return found


def read_consents(runtime: Runtime) -> DataFrame:
    """user_id and a column for each purpose, as export.consent says; a user may have several rows."""
    consent = runtime.config.export.consent
    assert consent is not None
    if consent.sql is not None:
        return ask(runtime, consent.sql, "export.consent.sql")
    return _read_rows(runtime, Path(str(consent.file)))


def consenting(consents: DataFrame, purpose: str, path: Path) -> DataFrame:
    """user_id, holds: what each row says of the purpose. A user all of whose rows say yes agrees."""
    if missing := {"user_id", purpose} - set(consents.columns):
        raise TrailvecError(
            f"{path} asks for the consent {purpose!r}: export.consent has no column {', '.join(sorted(missing))} "
            f"(found {', '.join(consents.columns)}): correct one of them"
        )
    said = F.coalesce(F.col(f"`{purpose.replace('`', '``')}`").cast("boolean"), F.lit(False))
    return consents.select(F.col("user_id").cast("string"), said.alias("holds"))


class Rule(NamedTuple):
    """A user who is in the list (`required`: who is not) is left out."""

    name: str
    mark: int
    required: bool = False


@dataclass(frozen=True)
class Rules:
    """What decides about a user of a segment.

    Attributes:
        steps: in the order in which they are looked at: the first one that leaves a user out is the one that counts.
        seeds: the mark of its seeds.
        exported: the marks of those who were exported once, twice, … within the days that the segment looks back.
    """

    steps: tuple[Rule, ...]
    seeds: int | None
    exported: tuple[int, ...]


def rules_of(
    runtime: Runtime, file: SegmentFile, lists: Lists, consents: DataFrame | None, *, log: DataFrame, now: datetime
) -> Rules:
    """The rules of a segment; the lists that it names are read.

    Args:
        log: the rows of `exports` that count.
    """
    segment, path = file
    steps: list[Rule] = []
    seeds: int | None = None
    exported: list[int] = []
    if segment.seeds is not None:
        seeds = lists.mark(f"seeds of {segment.name}", partial(read_users, runtime, segment.seeds, path))
        steps.append(Rule("seed", seeds))
    if segment.consent is not None:
        assert consents is not None
        mark = lists.mark(f"consent {segment.consent}", partial(consenting, consents, segment.consent, path))
        steps.append(Rule(f"no consent to {segment.consent}", mark, required=True))
    for users in segment.suppress:
        name = f"list {users.sql or (path.parent / str(users.file)).resolve()}"
        mark = lists.mark(name, partial(_read_suppressed, runtime, users, path))
        steps.append(Rule(f"suppressed by {users.file or 'a query'}", mark))
    if segment.at_most is not None:
        since = now.date() - timedelta(days=segment.at_most.days - 1)
        counts = log.where(~F.col("is_control") & (F.to_date("exported_at") >= F.lit(since))).groupBy("user_id").count()
        for n in range(1, segment.at_most.exports + 1):
            at_least = counts.where(F.col("count") >= n).select("user_id")
            exported.append(lists.mark(f"exported {n} times since {since}", partial(_same, at_least)))
        steps.append(Rule(limit_name(segment.at_most), exported[-1]))
    return Rules(tuple(steps), seeds, tuple(exported))


def _same(frame: DataFrame) -> DataFrame:
    return frame


def limit_name(limit: Frequency) -> str:
    return f"exported {limit.exports} times in {limit.days} days"


def deciding(lists: Lists, rules: Rules) -> dict[str, int]:
    """The columns by which `allows` decides for a segment: forbidden_… and required_…, the bits of its rules' lists."""
    columns: dict[str, int] = {}
    for kind, required in (("forbidden", False), ("required", True)):
        bits = lists.bits(rule.mark for rule in rules.steps if rule.required == required)
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
        out = [np.zeros(len(self._words), np.bool_), *(flags for _, flags in self.left_out(rules))]
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
