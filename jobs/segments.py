"""A segment's file: who is in it, who is left out, and how it is exported (conf/segments/*.toml).

Exactly one key says who is in it: `seeds` (the users most like a seed list), `affinity` (the users fondest of some
items), `sql` (a query's users) or `include` (the members of other segments). The first two are scored, and take the
best `size` users or those whose score is at least `threshold`. Left out are, in this order: the seeds themselves, users
without `consent`, users on the lists in `suppress`, users recently exported as often as `at_most` allows, and members
of the segments in `exclude`. Each key is documented at its field below.
"""

from __future__ import annotations

from glob import glob
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from jobs.config import UserList, no_home, parse, read_toml, shipped, written_as
from jobs.errors import TrailvecError
from spark_udfs.likeness import DEFAULT_METHOD, Method
from training.config import Section
from training.urls import holds_secret

Column = Literal["user_id", "score", "rank"]
VectorKind = Literal["embedding", "profile"]
Format = Literal["parquet", "csv.gz"]


class Seeds(UserList):
    """The users whom a segment's members should resemble."""

    method: Method = Field(
        DEFAULT_METHOD,
        description="nearest_seed: the highest cosine to any seed; tastes: the highest cosine to any cluster centre "
        "of the seeds; classifier: the cosine to the direction that separates the seeds from other users",
    )
    vectors: VectorKind | None = Field(
        None,
        description="the vectors to compare users by: embedding (user_embeddings) or, far better at finding people, "
        "profile (user_profiles); None: profile if the current model has profiles (`trailvec profile_users`)",
    )
    tastes: int = Field(8, ge=1, le=1000, description="number of cluster centres for method `tastes`")

    @model_validator(mode="after")
    def _tastes_by_their_method(self) -> Seeds:
        if "tastes" in self.model_fields_set and self.method != "tastes":
            raise ValueError(f"tastes needs method 'tastes', found {self.method!r}")
        return self


class Suppressed(UserList):
    """Users who are never exported."""

    may_be_empty: bool = Field(
        False,
        description="whether the list may hold no user at all; if not, nothing is exported then, because everyone who "
        "should be on it would be",
    )


class Affinity(Section):
    """The items to score users by: a user's score is the highest dot product of their vector with any of these items,
    that is, the model's own score of that item."""

    items: tuple[str, ...] = Field((), description="item ids")
    vertical: str | None = Field(None, description="all items of a vertical")
    category: str | None = Field(
        None, description="all items of a category; with `vertical`: only those of that vertical"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Affinity:
        if bool(self.items) == (self.vertical is not None or self.category is not None):
            raise ValueError("needs either items, or a vertical, a category or both")
        return self


class Frequency(Section):
    """Leaves out users exported `exports` times within `days` days (UTC, including today).

    Segments exported earlier in the same run count, in the order of `export.segments`, each after those that it names.
    For a segment with a control group, being held back by the segment itself or by another of the same control group
    counts as an export, added to what others exported: else those held back would fill more of its places every day, or
    with every segment. For all other segments it doesn't count, since the user received nothing. The log has no control
    groups: they are those of today's segments, and being held back by one that `export.segments` no longer names counts
    for none. Every run that exports counts, even a second one on a day, but not one that gives the same export another
    owner, purpose, approved_by, format, columns or rows_per_file: these users were exported already.
    """

    exports: int = Field(ge=1, le=100)
    days: int = Field(ge=1, le=36_500)


class Segment(Section):
    """The content of a segment file."""

    name: Annotated[str, written_as(r"[a-z0-9_-]+", "must consist of lower-case letters (a-z), digits, _ and -")] = (
        Field(description="also the name of its folder")
    )
    owner: str = Field(min_length=1, description="who is responsible for it")
    purpose: str = Field(min_length=1, description="what it is for")

    seeds: Seeds | None = None
    affinity: Affinity | None = None
    sql: str | None = Field(
        None,
        description="a query over the tables, except `exports`, with a column user_id; its users without a vector are "
        "left out. It and the queries of lists run again once a table that they read has changed and, if they use the "
        "current date or time or read a table that is not trailvec's, each day (UTC). They can't read files or draw at "
        "random: a LIMIT needs an ORDER BY",
    )
    include: tuple[str, ...] = Field(
        (),
        description="names of segments of the same run, whose members, including their control groups, are taken. "
        "Their exports count for this segment's at_most, so exports = 1 (in a union of unions, 2) is refused: it would "
        "leave nobody",
    )

    size: int | None = Field(
        None, ge=1, description="number of users to take, including the control group; fewer if there are not as many"
    )
    threshold: float | None = Field(None, description="the lowest score to take")

    consent: str | None = Field(None, description="a column of export.consent that must be true")
    suppress: tuple[Suppressed, ...] = Field((), description="lists of users who are never exported")
    at_most: Frequency | None = None
    exclude: tuple[str, ...] = Field((), description="names of segments of the same run whose members are left out")
    control_share: float = Field(0, ge=0, lt=1, description="share of the members to hold back, chosen by keyed hash")
    control_group: str | None = Field(
        None,
        min_length=1,
        description="segments that name the same group hold back the same users, and being held back by one counts for "
        "the at_most of all; None: the group named after the segment",
    )

    format: Format = Field(
        "parquet",
        description="csv.gz: ids that begin with = + - @ (also fullwidth), a tab, a line break or NUL get a ' in "
        "front, lest a spreadsheet run them as a formula; parquet leaves them as they are",
    )
    columns: tuple[Column, ...] = Field((), description="empty: user_id and, if the segment is scored, score and rank")
    user_ids: Literal["hashed", "plain"] = "hashed"
    approved_by: str | None = Field(None, min_length=1, description="who approved plain user ids")
    rows_per_file: int = Field(1_000_000, ge=1)
    destination: Annotated[str, AfterValidator(no_home)] | None = Field(
        None,
        description="a folder of its own, or a file system's URI (s3://…, hdfs://…); None: exports/<name>. A relative "
        "path starts from the working directory, not, as those of lists, from the segment's file",
    )

    @property
    def scored(self) -> bool:
        return self.seeds is not None or self.affinity is not None

    @property
    def group(self) -> str | None:
        """The name of the control group, if there is one."""
        return self.control_group or self.name if self.control_share else None

    @property
    def exported_columns(self) -> tuple[Column, ...]:
        return self.columns or (("user_id", "score", "rank") if self.scored else ("user_id",))

    @property
    def lists(self) -> tuple[UserList, ...]:
        return (*([] if self.seeds is None else [self.seeds]), *self.suppress)

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the segments that this one includes or excludes, which must be selected before it."""
        return (*self.include, *self.exclude)

    @property
    def needs_key(self) -> bool:
        return self.user_ids == "hashed" or self.control_share > 0

    @model_validator(mode="after")
    def _consistent(self) -> Segment:
        who = [name for name in ("seeds", "affinity", "sql", "include") if getattr(self, name)]
        if len(who) != 1:
            raise ValueError(
                f"needs exactly one of seeds, affinity, sql and include, found {' and '.join(who) or 'none'}"
            )
        limits = [name for name in ("size", "threshold") if getattr(self, name) is not None]
        if self.scored and len(limits) != 1:
            raise ValueError(f"{who[0]} needs either size or threshold, found {' and '.join(limits) or 'neither'}")
        if not self.scored and (limits or {"score", "rank"} & set(self.columns)):
            raise ValueError(f"{who[0]} gives no scores, so size, threshold and the columns score and rank don't apply")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns lists a column twice")
        if self.control_group is not None and not self.control_share:
            raise ValueError("control_group needs a control_share above 0, or it holds nobody back")
        if self.user_ids == "plain" and self.approved_by is None:
            raise ValueError("plain user ids need approved_by, the name of the person who approved them")
        return self

    @model_validator(mode="after")
    def _no_secret(self) -> Segment:
        if holds_secret(self.destination or ""):
            raise ValueError("destination contains credentials, which belong in the environment")
        return self


class SegmentFile(NamedTuple):
    segment: Segment
    path: Path


def read_segments(paths: list[str]) -> list[SegmentFile]:
    """The segments in the order of the files, but each after those that it includes or excludes.

    Raises:
        TrailvecError: a file is missing or invalid, two have the same name, or the same control group and different
            shares, one names an unknown segment or, directly or not, itself, a union's `at_most` leaves nobody, or a
            list is missing.
    """
    files = [SegmentFile(parse(Segment, read_toml(path), str(path)), path) for path in _paths(paths)]
    by_name: dict[str, SegmentFile] = {}
    by_group: dict[str, SegmentFile] = {}
    for file in files:
        segment, path = file
        if segment.name in by_name:
            raise TrailvecError(f"{path} and {by_name[segment.name].path} both set name = {segment.name!r}: rename one")
        by_name[segment.name] = file
        if segment.group is not None:
            first, where = by_group.setdefault(segment.group, file)
            if segment.control_share != first.control_share:  # one would export some whom the other holds back
                raise TrailvecError(
                    f"{path} and {where} share the control group {segment.group}, but the one's control_share is "
                    f"{segment.control_share:g}, the other's {first.control_share:g}: give both the same"
                )
        for users in segment.lists:
            if users.file is not None and not (path.parent / users.file).exists():
                raise TrailvecError(f"{path}: the list of users {path.parent / users.file} does not exist: add it")
    for segment, path in files:
        for other in segment.others:
            if other not in by_name:
                raise TrailvecError(
                    f"{path}: segment {other} is in no file of export.segments: add its file or correct the name"
                )
    try:
        TopologicalSorter({file.segment.name: file.segment.others for file in files}).prepare()
    except CycleError as error:
        cycle = " → ".join(error.args[1])
        raise TrailvecError(
            f"segments include or exclude each other in a cycle ({cycle}): remove one of these references"
        ) from None
    ordered = _ordered(files)
    _refuse_unions_of_nobody(ordered)
    return ordered


def _paths(patterns: list[str]) -> list[Path]:
    """Each file once, where it first comes: one named before a pattern that matches it, too, is exported before."""
    found: list[Path] = []
    for pattern in patterns:
        path = shipped(pattern)
        folder = shipped(path.parent)
        matching = [] if path.exists() else sorted(glob(path.name, root_dir=folder))
        found += [folder / name for name in matching] or [path]
    return list(dict.fromkeys(found))


def _ordered(files: list[SegmentFile]) -> list[SegmentFile]:
    """The files in their order, but each after those that it names. (TopologicalSorter would take whatever names none
    first, so a later segment's exports would count for an earlier one's `at_most`.)"""
    ordered: dict[str, SegmentFile] = {}

    def add(file: SegmentFile) -> None:
        if file.segment.name not in ordered:
            for other in files:
                if other.segment.name in file.segment.others:
                    add(other)
            ordered[file.segment.name] = file

    for file in files:
        add(file)
    return list(ordered.values())


def _refuse_unions_of_nobody(ordered: list[SegmentFile]) -> None:
    """Raises TrailvecError if the exports of a union's parts alone reach its `at_most`; `ordered`: parts first."""
    least: dict[str, int] = {}  # exports in this run, at least, of a segment's members outside of control groups
    for segment, path in ordered:
        of_parts = min((least[part] for part in segment.include), default=0)
        least[segment.name] = of_parts + 1
        if segment.at_most is not None and segment.at_most.exports <= of_parts:
            raise TrailvecError(
                f"{path}: at_most would count the exports of {', '.join(segment.include)}, and of what they include, "
                f"in this same run, at least {of_parts}, so nobody but their control groups would be left: raise "
                f"at_most.exports, set at_most in the parts, or write their conditions as one sql segment"
            )
