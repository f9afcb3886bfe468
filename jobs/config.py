"""The configuration: TOML files parsed once into typed models.

A file may say `extends = "base.toml"` (a path beside it, else in trailvec's own conf/); its own values win, and
`--set a.b=c` wins over both. conf/ ships with trailvec, also in its wheel, so `conf/base.toml` is found from any
directory (`shipped`).
An unknown key is an error that names the nearest known one, or the section that has it. Each key is documented here, in
its description.
Relative paths in values start from the working directory.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
import zoneinfo
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from jobs.errors import TrailvecError
from training.config import Section, TrainSettings, UtcDatetime
from training.urls import local_path, not_for_training

_OWN = Path(__file__).parent.parent  # has conf/ beside the packages
M = TypeVar("M", bound=BaseModel)
V = TypeVar("V")
# Fixed in every session of trailvec, since the rows depend on them: a configuration must not change them.
SPARK_FIXED = {
    # The days by which tables are pruned, cut and measured are UTC days.
    "spark.sql.session.timeZone": "UTC",
    # A text that is not a number or a time becomes NULL, which ingest rejects with a reason, never an exception.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.legacy.timeParserPolicy": "CORRECTED",
    # A folder store=007 means "007", whatever the other folders' values look like.
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    # A time without a zone is one in the zone that its mapping names, not in UTC.
    "spark.sql.parquet.inferTimestampNTZ.enabled": "true",
    "spark.sql.timestampType": "TIMESTAMP_LTZ",
    # Parquet timestamps as microseconds, not INT96: what other readers expect.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Dates before 1582 and times before 1900 (0001-01-01 for "none") are what the file says: by default a single one
    # fails the job, unless Spark wrote the file. (Files of Spark 2 and older say so, and are read by their calendar.)
    **{
        f"spark.sql.parquet.{mode}": "CORRECTED"
        for mode in ("datetimeRebaseModeInRead", "int96RebaseModeInRead", "datetimeRebaseModeInWrite")
    },
    # A write that changes nothing (an empty table stays empty) still records what ran.
    "spark.databricks.delta.skipRecordingEmptyCommits": "false",
}


def written_as(pattern: str, words: str) -> AfterValidator:
    """For a text: what it must be, as a pattern and in words that go on from "which"."""

    def written(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"found {text!r}, which {words}")
        return text

    return AfterValidator(written)


def _known_zone(name: str) -> str:
    # Not places: "Factory" is unknown to Arrow, "localtime" is whatever the machine is set to.
    if name not in zoneinfo.available_timezones() - {"Factory", "localtime"}:
        raise ValueError(f"found {name!r}, which is not an IANA time zone")
    return name


def _known_tables(by_table: dict[str, V]) -> dict[str, V]:
    from jobs.tables import TABLES  # noqa: PLC0415 - it imports PySpark

    names = [table.name for table in TABLES]
    for name in by_table:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(f"no table is named {name}; the nearest name is {near[0]}")
    return by_table


def _aging_tables(by_table: dict[str, V]) -> dict[str, V]:
    from jobs.tables import TABLES  # noqa: PLC0415 - as above

    aging = [table.name for table in TABLES if table.ages_by]
    for name in _known_tables(by_table):
        if name not in aging:
            raise ValueError(f"the rows of {name} have no age; name only {', '.join(aging)}")
    return by_table


def no_home(place: str) -> str:
    if place.startswith("~"):
        raise ValueError(f"found {place!r}, but ~ is not expanded here and has to be written out")
    return place


def _in_quotes(conf: Any) -> Any:
    """Refuses a section inside the section, which is how TOML reads an unquoted key with dots."""
    for key, value in conf.items() if isinstance(conf, dict) else ():
        if isinstance(value, dict):
            raise ValueError(
                f"found a section {key}: a key that contains dots must be in quotes, as in "
                f'spark.conf."spark.executor.memory" = "4g"'
            )
    return conf


def _not_fixed(conf: dict[str, str]) -> dict[str, str]:
    for key in conf:
        if "." not in key:
            raise ValueError(f"found {key}, which has no dot, so it is no setting of Spark and belongs elsewhere")
    for key, value in SPARK_FIXED.items():
        if conf.get(key, value) != value:
            raise ValueError(f"found {key} = {conf[key]!r}, which must be {value}, since the rows depend on it")
    return conf


VALID_DAYS, TEST_DAYS = 56, 28  # before the log's end: where training and validation end by default
_MOST_DAYS = 36_500  # up to a hundred years: times stay in Python's range
Minutes = Annotated[float, Field(gt=0, le=_MOST_DAYS * 1440)]
TimeZone = Annotated[str, AfterValidator(_known_zone)]
DatabaseName = Annotated[
    str,
    written_as(
        r"[A-Za-z_][A-Za-z0-9_]*", "must consist of letters (a-z, A-Z), digits and _, and not begin with a digit"
    ),
]
LikePattern = Annotated[  # as Spark accepts it
    str,
    written_as(r"([^\\]|\\[_%\\])+", "must not be empty, and have a backslash only before _, % or another backslash"),
]
# A folder or a file. Databricks' URIs become local mount paths: dbfs:/Volumes/… is /Volumes/…, dbfs:/… is /dbfs/….
PlaceName = Annotated[str, AfterValidator(no_home), AfterValidator(lambda place: local_path(place) or place)]


class StorageSettings(Section):
    """Where tables, models and exports are stored."""

    root: PlaceName = Field(
        "build/warehouse",
        min_length=1,
        description="folder or file system URI that holds everything trailvec writes; on Databricks in a volume",
    )
    database: DatabaseName = Field("trailvec", description="name of the database in SQL")


class SparkSettings(Section):
    """How Spark is started, if nothing else has started it. What is set here wins over what spark-submit was given, but
    for its master and what Java needed as it started (the driver's memory)."""

    master: str = Field(
        "local[*]",
        description="empty: the master set by whatever started Spark. The master that spark-submit was given wins, "
        "unless it is local[*], which spark-submit has by default",
    )
    conf: Annotated[dict[str, str], BeforeValidator(_in_quotes), AfterValidator(_not_fixed)] = Field(
        default_factory=dict, description="spark.* settings, except those that the rows depend on (SPARK_FIXED)"
    )


class IngestSettings(Section):
    """files → events."""

    sources: list[str] = Field(default_factory=list, description="the sources' mapping files (conf/sources/*.toml)")
    data_dir: PlaceName = Field(".", min_length=1, description="the folder that relative paths in a mapping start from")
    max_rejected_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the job stops if it rejects more than this share of a batch, and of all records that the run has "
        "read from one input",
    )
    earliest: UtcDatetime = Field(datetime(2000, 1, 1), description="UTC; earlier events are rejected")
    future_tolerance_hours: float = Field(
        24, ge=0, le=876_000, description="events further in the future than this are rejected"
    )
    negative_amount_event_types: list[str] = Field(
        default_factory=lambda: ["return", "refund"], description="event types whose amount may be negative"
    )
    duplicates: Literal["everywhere", "same_day"] = Field(
        "everywhere",
        description="where duplicates (events with the same id) are searched for: in the whole table, or only within "
        "a day (UTC)",
    )
    max_files_per_batch: int = Field(1000, ge=1, description="files read, checked and committed together")
    max_records_per_batch: int = Field(
        5_000_000, ge=1, description="Kafka: records read, checked and committed together"
    )


class FlagUsersSettings(Section):
    """events → flagged_users: which users are bots or test accounts. To turn a rule off, set it to a number that nobody
    reaches: 1_000_000_000, the largest allowed."""

    events_per_minute: int = Field(
        1_000,
        ge=1,
        le=10**9,
        description="more events than this in one minute (in a log of dates without "
        "times, a day is one minute: set it to events_per_day)",
    )
    events_per_day: int = Field(20_000, ge=1, le=10**9, description="more events than this in one day (UTC)")
    constant_interval_events: int = Field(
        200, ge=3, le=10**9, description="at least this many consecutive events in one day, at a constant interval"
    )
    test_accounts: list[LikePattern] = Field(
        default_factory=list, description="SQL LIKE patterns of user ids ('qa-%'); a user who matches one is flagged"
    )


class SessionizeSettings(Section):
    """events → sessions."""

    gap_minutes: Minutes = Field(30, description="a pause longer than this ends a session")
    gap_minutes_by_vertical: dict[str, Minutes] = Field(
        default_factory=dict,
        description="gaps that override gap_minutes, by the vertical of the event before the pause",
    )
    max_minutes: Minutes | None = Field(
        None, description="an event more than this after the session's first event starts a new session; None: no limit"
    )
    max_events: int = Field(10_000, ge=1, description="a session ends after this many events, which bounds memory")
    midnight_of: TimeZone | None = Field(
        None, description="IANA time zone whose midnight ends a session; None: midnight ends no session"
    )
    cut_on_vertical: bool = Field(False, description="an event of another vertical starts a new session")


class VocabularySettings(Section):
    """events → items, context_values."""

    min_count: int = Field(5, ge=1, description="items with fewer events in the training window are unknown to a model")


class SequencesSettings(Section):
    """sessions + items → sequences."""

    max_length: int = Field(64, ge=2, description="maximum number of actions in one row")
    max_parts: int = Field(
        64,
        ge=1,
        description="maximum number of train rows per user: the newest max_length actions, the max_length before "
        "them, ...",
    )
    split_by: Literal["time", "leave_one_out"] = Field(
        "time", description="leave_one_out is only for comparison with papers"
    )
    valid_from: UtcDatetime | None = Field(
        None, description=f"UTC; training ends here. None: {VALID_DAYS} days before the log's end (see cut_step_days)"
    )
    test_from: UtcDatetime | None = Field(
        None, description=f"UTC; validation ends here. None: {TEST_DAYS} days before the log's end (see cut_step_days)"
    )
    cut_step_days: int = Field(
        7,
        ge=1,
        le=_MOST_DAYS,
        description="cuts that follow the log's end move on by this many days at a time, at midnight UTC (by weeks, on "
        "Mondays); a run that moves them rebuilds items and sequences, the others are incremental",
    )
    seen_days: int = Field(
        28,
        ge=0,
        le=_MOST_DAYS,
        description="items of which the user had an event of target_event_types in this many days before the cut do "
        "not count as new (those that they only viewed do, where purchases are predicted); 0: in all time, which "
        "leave_one_out always uses. With 0 validation during training asks for new items only, otherwise for any",
    )
    target_event_types: list[str] = Field(
        default_factory=list,
        description="event types to predict, in training and evaluation; the others are context alone; empty: all",
    )
    rows_per_file: int = Field(
        262_144,
        ge=1,
        description="maximum number of rows in one file of a split when the whole table is rebuilt (an incremental "
        "MERGE writes its own files); the number of files follows from it",
    )

    @model_validator(mode="after")
    def _in_order(self) -> SequencesSettings:
        if self.valid_from and self.test_from and self.valid_from > self.test_from:
            raise ValueError(f"valid_from = {self.valid_from} must not be after test_from = {self.test_from}")
        return self


class ScoreSettings(Section):
    """sequences + model → user_embeddings."""

    batch_size: int = Field(256, ge=1, description="rows per forward pass")
    chunk_users: int = Field(
        500_000,
        ge=1,
        description="a new model's vectors are committed in chunks of about this many users, but at most 4 chunks "
        "(each reads the whole table); a kill loses at most the work on one chunk",
    )


class AlignSettings(Section):
    """What a new model must preserve of the current one to become current itself."""

    min_overlap: float = Field(
        0.1,
        ge=0,
        le=1,
        description="minimum share of the 10 nearest items that must stay the same, on average, both of users and of "
        "items",
    )
    max_ranking_loss: float = Field(
        0.1,
        ge=0,
        le=1,
        description="maximum relative drop of NDCG@10 in validation below the current model's, if both have at least "
        "1,000 held-out users",
    )


class ModelSettings(Section):
    """Which model the stages after training use."""

    version: str | None = Field(None, description="None: the most recently trained model (models/current.json)")


class DriftSettings(Section):
    """Limits beyond which the drift of the log or the vectors raises an alarm. The verticals' shares and events from
    the cut on are compared with those of as many days before it."""

    max_stability: float = Field(0.25, gt=0, description="population stability index of the verticals' shares")
    max_rate_factor: float = Field(
        3, gt=1, description="factor by which a vertical's number of events may rise or fall"
    )
    min_events: int = Field(
        1_000, ge=1, description="a vertical with fewer events in both periods together raises no alarm"
    )
    max_new_items: float = Field(
        0.3, gt=0, le=1, description="share of the events after the cut whose items were first seen after it"
    )
    min_user_cosine: float = Field(
        0.5, ge=-1, le=1, description="mean over users of the cosine between their vectors at the cut and at the end"
    )


FEW_USERS = 30  # a confidence interval over fewer is too narrow to trust (docs/decisions/0016)


class GateSettings(Section):
    """A row of `evaluation`, named by its columns, and the limits a model must meet in it to become current."""

    task: Literal["next", "new", "repeat", "space", "drift"] = Field(description="next, new or repeat; or space, drift")
    method: str = Field(
        description="model, model_and_habit or a baseline; for space and drift, what the metric is about (column "
        "method)"
    )
    metric: str = Field(description="such as ndcg@10, or model_lead_ndcg@10 for the lead over a baseline")
    slice: str = Field("all", description="all, history, hours or vertical")
    slice_value: str = Field(
        "all", description="the value within the slice, such as 5-19 or a vertical; all: for slice all"
    )
    at_least: float | None = Field(
        None,
        description="the whole interval must lie above this; in a row without an interval, the value must not be "
        "below it",
    )
    at_most: float | None = Field(
        None,
        description="the whole interval must lie below this; in a row without an interval, the value must not be "
        "above it",
    )
    min_users: int = Field(FEW_USERS, ge=1, description="a row whose interval covers fewer users does not pass")

    @model_validator(mode="after")
    def _says_something(self) -> GateSettings:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least, at_most or both, found neither")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"no value is at_least = {self.at_least:g} and at_most = {self.at_most:g}")
        return self


class HabitSettings(Section):
    """How a user's repeated actions are added to the model's score (jobs/habit.py)."""

    weight: float = Field(15.0, ge=0, description="weight of the habit relative to the dot product of user and item")
    decay: float = Field(0.5, gt=0, description="an action counts (weeks ago)^-decay, an action of the last week 1")


class EvaluateSettings(Section):
    """vectors + sequences → evaluation."""

    split: Literal["valid", "test"] = Field("test", description="valid to choose settings, test to report results")
    max_users: int = Field(
        20_000, ge=1, description="maximum number of users to evaluate; if there are more, a sample by hash of user_id"
    )
    resamples: int = Field(
        1_000, ge=1, description="resamples in the bootstrap over users that the intervals come from"
    )
    drift: DriftSettings = Field(default_factory=DriftSettings)
    gate: list[GateSettings] = Field(
        default_factory=list,
        description="conditions on a model's rows that score_users checks before it makes the model current",
    )


class NeighboursSettings(Section):
    """vectors → neighbours."""

    kinds: list[Literal["user_item", "user_user", "item_item"]] = Field(
        default=["user_item", "user_user", "item_item"],
        min_length=1,
        description="which kinds to find; each compares all pairs: with very many users leave out user_user",
    )
    metrics: dict[Literal["user_item", "user_user", "item_item"], Literal["dot", "cosine"]] = Field(
        default_factory=dict,
        description="by kind, what makes a neighbour near: dot (product) or cosine; a kind that is not named: dot for "
        "user_item, which is the model's own score, cosine for the others",
    )
    k: int = Field(10, ge=1, description="neighbours of each item or user")
    block_rows: int = Field(4096, ge=1, description="vectors on each side of a matrix product")
    cells: int = Field(
        0,
        ge=0,
        description="0: exact search; otherwise an inverted file with this many cells (4 √candidates works well; "
        "needs faiss); pays over a million candidates and many queries (docs/sizing.md)",
    )
    probes: int = Field(16, ge=1, description="cells searched per query: more cells raise recall and cost")
    verticals: list[str] = Field(
        default_factory=list,
        description="only items of these verticals can be neighbours; empty: items of all verticals",
    )
    in_stock: PlaceName | None = Field(
        None,
        description="list of the only items that can be neighbours: Parquet or CSV (.csv, .csv.gz) with a column "
        "item_id, or a folder of such files with the same ending in its name; any other file: text, one item id per "
        "line. None: all items",
    )
    without: list[str] = Field(
        default_factory=list,
        description="event types: a user's items leave out those with which the user has such an event (`purchase`: "
        "already bought)",
    )
    habit: bool = Field(
        False,
        description="also find user_item_habit: a user's items by the model's score plus the user's habit; scores "
        "every item with which the user ever had an event of a predicted type",
    )

    @model_validator(mode="after")
    def _has_what_is_changed(self) -> NeighboursSettings:
        if self.without and "user_item" not in self.kinds:
            raise ValueError(
                "without leaves items out of user_item, so kinds must contain user_item, or without be empty"
            )
        if self.habit and "user_item" not in self.kinds:
            raise ValueError("habit = true adds to user_item, so kinds must contain user_item, or habit be false")
        if self.habit and self.metrics.get("user_item") == "cosine":
            raise ValueError("habit = true adds to dot products, so metrics.user_item must be dot, or habit be false")
        return self


class MaintainSettings(Section):
    """Upkeep of the tables."""

    retention_hours: float = Field(
        168,
        ge=24,
        le=720,  # Delta itself keeps its history for 30 days
        description="how long files that are no longer part of a table are kept for readers that started earlier; "
        "also how long a stage can go without running and still continue from the changes (raising it does not bring "
        "deleted files back: run the stages first, or once with --force)",
    )
    retention_hours_of: Annotated[dict[str, Annotated[float, Field(ge=24, le=720)]], AfterValidator(_known_tables)] = (
        Field(default_factory=dict, description="the same for single tables, by name")
    )
    keep_days: Annotated[dict[str, Annotated[int, Field(ge=1, le=_MOST_DAYS)]], AfterValidator(_aging_tables)] = Field(
        default_factory=dict,
        description="by table (events, rejected_events, exports): rows older than this many whole days (UTC) are "
        "deleted; what is derived from events, including when an item was first seen, follows in the next run. A "
        "table not named keeps all rows",
    )
    target_file_mb: int = Field(256, ge=1, description="OPTIMIZE compacts files up to this size")
    usd_per_gb_month: float = Field(
        0.023,
        ge=0,
        description="the storage's price for 2**30 bytes, from which the report computes costs (default: S3 Standard)",
    )

    def retention_hours_for(self, table: str) -> float:
        """For how many hours files that the table dropped are kept."""
        return self.retention_hours_of.get(table, self.retention_hours)


class UserList(Section):
    """A list of users: either a file or a query."""

    file: PlaceName | None = Field(
        None,
        description="Parquet or CSV (.csv, .csv.gz) with a column user_id, or a folder of such files with the same "
        "ending in its name; any other file: text, one user id per line. A relative path in a segment's file starts "
        "from that file's folder, elsewhere from the working directory",
    )
    sql: str | None = Field(None, description="a query over the tables with a column user_id")

    @model_validator(mode="after")
    def _one_of_two(self) -> UserList:
        if (self.file is None) == (self.sql is None):
            raise ValueError("needs exactly one of file and sql")
        return self


class ExportSettings(Section):
    """user_embeddings → segment files."""

    segments: list[str] = Field(
        default_factory=list,
        description="the segments' files, relative to the working directory. Wildcards in a file's name stand for all "
        "files of such names (conf/segments/*.toml), in alphabetical order. Segments are exported in this order, but "
        "each after those that it includes or excludes",
    )
    consent: UserList | None = Field(
        None,
        description="who has consented to what: user_id and one column per purpose, boolean, or true, false, 1 or 0 "
        "as text or whole numbers; a file is Parquet or CSV with a header, its path relative to the working "
        "directory. A user who is missing, or whose value is missing, has not consented; if a user has several rows, "
        "all must be true",
    )


class ProfileSettings(Section):
    """sessions + model → user_profiles."""

    fit_users: int = Field(20_000, ge=2, description="users that the basis is fitted on, sampled by hash of user_id")
    item_width: int = Field(256, ge=1, description="singular directions of the items")
    width: int = Field(
        64, ge=1, description="singular directions each of amounts, of the words in item names, and of categories"
    )


class ProbeSettings(Section):
    """vectors + labels → probes."""

    labels: UserList | None = Field(
        None,
        description="labels to predict: user_id, task, label (0 or 1) and, if labels belong to a time, label_ts (only "
        "what came before it is used); a file is Parquet or CSV with a header",
    )
    activity: list[Literal["inactive", "new_vertical"]] = Field(
        default_factory=list,
        description="tasks labelled from the log's last `days`: inactive (no event of sequences.target_event_types), "
        "new_vertical (such an event in a vertical in which the user had none before)",
    )
    event_types: list[str] = Field(
        default_factory=list,
        description="event types, one task each: does the user have such an event in the log's last `days`?",
    )
    days: float = Field(
        28, gt=0, le=_MOST_DAYS, description="how many days before the log's end those tasks have their cut"
    )
    heads: tuple[Literal["logistic", "boosting", "mlp"], ...] = Field(
        ("logistic", "boosting", "mlp"), description="models that are trained on the features"
    )
    folds: int = Field(
        5, ge=2, description="folds of the cross-validation: stratified, or by time if the labels have one"
    )
    seeds: int = Field(
        5,
        ge=2,
        description="runs with different folds and different heads, whose spread is the std; folds by time stay the "
        "same, and the std is their spread",
    )
    max_users: int = Field(
        20_000,
        ge=1,
        description="maximum number of labelled users of a task; if there are more, a sample by hash of user_id. If "
        "there are fewer, unlabelled users, from whose items the item baseline learns too, fill up to this number",
    )


class Config(Section):
    """The whole configuration."""

    storage: StorageSettings = StorageSettings()
    spark: SparkSettings = SparkSettings()
    ingest: IngestSettings = IngestSettings()
    flag_users: FlagUsersSettings = FlagUsersSettings()
    sessionize: SessionizeSettings = SessionizeSettings()
    vocabulary: VocabularySettings = VocabularySettings()
    sequences: SequencesSettings = SequencesSettings()
    train: TrainSettings = TrainSettings()
    model: ModelSettings = ModelSettings()
    align: AlignSettings = AlignSettings()
    score: ScoreSettings = ScoreSettings()
    habit: HabitSettings = HabitSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    profile: ProfileSettings = ProfileSettings()
    probe: ProbeSettings = ProbeSettings()
    neighbours: NeighboursSettings = NeighboursSettings()
    export: ExportSettings = ExportSettings()
    maintain: MaintainSettings = MaintainSettings()

    @model_validator(mode="after")
    def _grows_over_time(self) -> Config:
        if self.train.warm_start and self.sequences.split_by == "leave_one_out":
            raise ValueError(
                "train.warm_start = true continues from the time up to which a model was trained, but with "
                "sequences.split_by = leave_one_out each user has a cut of their own, so one of the two must go"
            )
        return self


def load_config(path: str | Path | None = None, sets: list[str] | None = None) -> Config:
    """The configuration from a file (None: all defaults) and `a.b=c` settings, resolved.

    Raises:
        TrailvecError: the file is missing or not TOML, a key is unknown, a value has the wrong type, or storage.root is
            a path that training or Spark can't read, or another folder for each.
    """
    values = _read_with_bases(shipped(path)) if path is not None else {}
    for assignment in sets or []:
        _assign(values, assignment)
    config = parse(Config, values, str(path) if path is not None else "the settings")
    root = config.storage.root
    place = root if local_path(root) is None else str(Path(root).absolute())
    # Checked here, not in `train`: the stages before it accept any name and may run for hours.
    if found := not_for_training(place):
        raise TrailvecError(
            f"storage.root = {place} contains {found}, which training can't read: choose a path without it"
        )
    # Python finds the mount there, but Spark takes the path for one within DBFS, dbfs:/dbfs/….
    if Path(place).parts[:2] == ("/", "dbfs"):
        raise TrailvecError(
            f"storage.root = {place} is on DBFS, but outside of its volumes Python and Spark would each use another "
            f"folder: choose one in a volume, /Volumes/catalog/schema/volume/..."
        )
    if wild := re.search(r"[][{}*\\]", place):
        raise TrailvecError(
            f"storage.root = {place} contains {wild[0]}, which Spark reads as a glob pattern: choose a path without it"
        )
    return config


def parse(model: type[M], values: dict[str, Any], where: str) -> M:
    """`values` validated as a `model`.

    Raises:
        TrailvecError: a value is wrong or a key unknown; the message says where, and names the nearest known key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise TrailvecError(f"{where}: {_sentence(model, error)}") from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with a model's values, and how to mend it."""
    errors = error.errors(include_url=False)
    # A mistyped key also leaves the right one missing: report the mistyped one.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key, value = ".".join(map(str, first["loc"])), first["input"]
    if first["type"] == "missing":
        return f"{key} is missing: add it"
    if first["type"] == "value_error":
        what = f"{key}: " if key else ""
        return f"{what}{first['ctx']['error']}: correct it"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {_instead(model, first['loc'], value)}"
    found = "{ ... }" if isinstance(value, dict) else repr(value)
    shape = _shape(model, first["loc"], first["type"])
    return f"{key} = {found}: " + (f"write {shape}" if shape else f"{first['msg']}: correct it")


def _shape(model: type[BaseModel], location: tuple[int | str, ...], wrong: str) -> str | None:
    """What to write where a table or a list is wanted; `wrong`: the type of pydantic's error."""
    section = _section_at(model, location)
    keys = _keys(section)
    table, known = f"{{ {keys[0]} = ... }}", f"(known keys: {', '.join(keys)})"
    if wrong == "model_type":
        return f"a table, such as {table} {known}"
    if wrong == "dict_type":
        _, values = get_args(section.model_fields[str(location[-1])].annotation)
        if (*get_args(values), values)[0] in (int, float):  # perhaps Annotated with its limits
            return "a table of numbers, such as { a = 30 }"
        return 'a table with its texts in quotes, such as { a = "b" }'
    if wrong not in ("list_type", "tuple_type"):
        return None
    if section is _section_at(model, location[:-1]):
        return 'a list of texts in quotes, such as ["a", "b"]'
    heading = ".".join(part for part in location if isinstance(part, str))
    return f"a list of tables, such as [{table}], or each of them below [[{heading}]] {known}"


def _instead(model: type[BaseModel], location: tuple[int | str, ...], value: Any) -> str:
    """What may have been meant by an unknown key."""
    *around, name = map(str, location)
    known = _keys(_section_at(model, location[:-1]))

    def near(cutoff: float) -> list[str]:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        return [f"did you mean {key}?" for key in nearest if key != name]  # --set extends: not a setting

    homes = [] if name in around else [*_homes(model, name, value)]
    # Before a mere likeness: [train] max_length is not warm_length. More places, such as all columns, help nobody.
    elsewhere = [f"{name} belongs {' or '.join(homes)}"] if 1 <= len(homes) <= 3 else []
    return [*near(0.85), *elsewhere, *near(0.5), f"known keys: {', '.join(known)}"][0]


def _homes(model: type[BaseModel], name: str, value: Any, path: str = "", several: bool = False) -> Iterator[str]:
    """Where in a TOML file a key of this name belongs; a section's name only with a section as its value."""
    field = model.model_fields.get(name)
    is_section = field is not None and _section(field.annotation) is not None
    if name in _keys(model) and (not is_section or isinstance(value, dict | list)):
        yield f"below [[{path}]]" if several else f"below [{path}]" if path else "above the first [heading]"
    for key, field in model.model_fields.items():
        if section := _section(field.annotation):
            repeats = get_origin(field.annotation) in (list, tuple)
            yield from _homes(section, name, value, f"{path}.{key}" if path else key, repeats)


def shipped(path: str | Path) -> Path:
    """The path or, if only that exists, the path of trailvec's own file of this name, beside its packages."""
    own = _OWN / path
    return own if own.exists() and not Path(path).exists() else Path(path)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's values.

    Raises:
        TrailvecError: the file is missing, can't be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors may write a BOM
    except FileNotFoundError:
        raise TrailvecError(f"{path} does not exist: correct the path") from None
    except OSError as error:  # such as a folder
        raise TrailvecError(f"{path} can't be read ({error.strerror}): correct the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrailvecError(f"{path} is not a valid TOML file: {error}: correct it") from None


def _read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's values merged over those of the file that it extends; `above`: the files that extend it."""
    values, chain = read_toml(path), (*above, path.resolve())
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise TrailvecError(f'{path}: extends = {base!r}: name one file, such as extends = "base.toml"')
    beside, own = path.parent / base, _OWN / "conf" / base
    found = beside if beside.exists() else own
    if not found.exists():
        raise TrailvecError(
            f"{path}: extends = {base!r}, which is neither beside it nor in trailvec's conf/: correct it"
        )
    if found.resolve() in chain:
        raise TrailvecError(f"{path}: extends = {base!r} leads back to a file that extends it: name another")
    return _merge(_read_with_bases(found, chain), values)


def _merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Sets `a.b=c` in place; c is read as TOML or, if it is not TOML or the setting is a string, as a plain string.
    A part of the key with dots in it must be quoted."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise TrailvecError(f"--set {assignment}: expected key=value: write, for example, --set train.epochs=2")
    path = _parts(key)
    value: Any = text
    with contextlib.suppress(tomllib.TOMLDecodeError):
        value = tomllib.loads(f"value = {text}")["value"]
    if isinstance(value, int | float | date | time) and _is_text(path):
        value = text.strip()  # a model's version may consist of digits only
    if isinstance(value, dict) and (section := _fixed_section(path)):  # would drop what the file has set in it
        name = ".".join(path)
        raise TrailvecError(
            f"--set {assignment}: {name} is a section, which this would replace in whole: set each of its keys by "
            f"itself, such as --set {name}.{next(iter(value), _keys(section)[0])}=..."
        )
    *parents, last = path
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise TrailvecError(f"--set {assignment}: {parent} is a value, not a section: correct the key")
    values[last] = value


def _parts(key: str) -> list[str]:
    """The parts of a dotted key, as TOML parses it; if it is not a TOML key, the parts between its dots."""
    try:
        node: Any = tomllib.loads(f"{key} = 0")
        parts = []
        while isinstance(node, dict):
            ((part, node),) = node.items()
            parts.append(part)
        return parts
    except ValueError:
        return key.split(".")


def _fixed_section(path: list[str]) -> type[BaseModel] | None:
    """The section of this name, if every configuration has it. (One that may be missing, such as a list of users, is
    set in whole.)"""
    section: type[BaseModel] = Config
    for name in path:
        field = section.model_fields.get(name)
        kind = field and field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None
        section = kind
    return section


def _is_text(path: list[str]) -> bool:
    """Whether the setting is a string."""
    wanted: list[Any] = [Config]
    for name in path:
        section = next((w for w in wanted if isinstance(w, type) and issubclass(w, BaseModel)), None)
        if section is None:
            inner = next((get_args(w)[1] for w in wanted if get_origin(w) is dict), None)
        else:
            inner = section.model_fields[name].annotation if name in section.model_fields else None
        wanted = [*get_args(inner)] if get_origin(inner) in (Union, UnionType) else [inner]
    return any(w is str or getattr(w, "__origin__", None) is str for w in wanted)


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section at a validation error's location, or around it."""
    for part in location:
        field = model.model_fields.get(str(part))
        model = (field and _section(field.annotation)) or model
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, perhaps several times or not at all."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _keys(section: type[BaseModel]) -> list[str]:
    """The keys that a section knows; a whole configuration can also extend another."""
    return [*section.model_fields, *(["extends"] if section is Config else [])]
