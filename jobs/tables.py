"""All of trailvec's tables as data: columns, types, comments, keys; and `conform`, which enforces these contracts.

A stage ends with `conform(df, TABLE)`, which selects exactly the contract's columns, in its order and with its types.
Timestamps are UTC with microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType, _parse_datatype_string

from jobs.errors import TrailvecError


@dataclass(frozen=True)
class Column:
    """One column: its Spark type as DDL text, what it means, and whether it may be NULL."""

    name: str
    type: str
    comment: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One Delta table.

    Attributes:
        key: the columns that identify a row; empty if rows have no key.
        stage: the stage that writes it.
        cluster_by: liquid clustering (Delta's OPTIMIZE puts rows with similar values into the same files).
        revision: increased when code changes give other rows from the same input and settings; incremental stages then
            rebuild the table.
        users_in: columns other than user_id that hold user ids, each with the SQL condition (over `old.*`) under which
            they do; erase_users searches these too.
        personal: other columns whose values may identify a person.
        ages_by: the column that tells a row's age, if rows may be deleted for their age (maintain.keep_days).
    """

    name: str
    comment: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    stage: str
    partition_by: tuple[str, ...] = ()
    cluster_by: tuple[str, ...] = ()
    revision: int = 1
    properties: dict[str, str] = field(default_factory=dict)
    users_in: dict[str, str] = field(default_factory=dict)
    personal: tuple[str, ...] = ()
    ages_by: str | None = None

    def user_columns(self) -> dict[str, str]:
        """All columns that hold user ids, each with the condition under which it does."""
        return {c.name: "TRUE" for c in self.columns if c.name == "user_id"} | self.users_in

    def statistics_columns(self) -> tuple[str, ...]:
        """The columns with min/max statistics per file in Delta's log: plain ones that identify nobody.

        Rows aren't ordered by user, so statistics on user ids would skip no file; and the log outlives the data.
        """
        silent = {*self.user_columns(), *self.personal, *self.partition_by}
        return tuple(c.name for c in self.columns if c.name not in silent and "<" not in c.type and c.type != "boolean")

    def schema(self) -> StructType:
        """The table's Spark schema, comments included. Needs a running Spark session (it parses DDL)."""
        return StructType(
            [StructField(c.name, _spark_type(c.type), c.nullable, {"comment": c.comment}) for c in self.columns]
        )


@cache
def _spark_type(ddl: str) -> DataType:
    """Cached: Spark first takes each for a list of columns, and throws; a stage's checks took .2 s that way."""
    return _parse_datatype_string(ddl)


def conform(df: DataFrame, table: Table) -> DataFrame:
    """`df` with exactly the table's columns, in its order and with its types.

    Raises:
        TrailvecError: a column of the contract is missing; the message names it and the columns found.
    """
    missing = [c.name for c in table.columns if c.name not in df.columns]
    if missing:
        raise TrailvecError(
            f"table {table.name} needs the columns {', '.join(missing)}; found {', '.join(df.columns)}: "
            f"add them before conform()"
        )
    return df.select(
        *[F.col(c.name).cast(c.type).alias(c.name, metadata={"comment": c.comment}) for c in table.columns]
    )


def of_model(rows: DataFrame, version: str) -> DataFrame:
    """One model's rows, from a table that keeps those of several."""
    return rows.where(F.col("model_version") == version)


def events_of(sessions: DataFrame, *names: str) -> DataFrame:
    """One row per event of the sessions: user_id, `opens` (whether it is its session's first) and the named columns of
    EVENT_IN_SESSION. Only these are read: after a plain explode Spark reads all fields, and ids are most of the bytes.
    """
    fields = F.arrays_zip(*[f"events.{name}" for name in names])
    exploded = sessions.select("user_id", F.posexplode(fields).alias("place", "event"))
    return exploded.select("user_id", (F.col("place") == 0).alias("opens"), "event.*")


def differences(new: DataFrame, old: DataFrame, table: Table) -> DataFrame:
    """The rows that only one of two frames with the table's columns has, or that differ under the same key: the key,
    and the structs `new` and `old`, NULL if that frame has no such row."""

    def whole(rows: DataFrame, name: str) -> DataFrame:
        return rows.select(*table.key, F.struct(*[c.name for c in table.columns]).alias(name))

    both = whole(new, "new").join(whole(old, "old"), list(table.key), "full_outer")
    return both.where(~F.col("new").eqNullSafe(F.col("old")))


# Downstream stages read the change data feed; with deletion vectors, a changed row doesn't rewrite its whole file.
_INCREMENTAL = {"delta.enableChangeDataFeed": "true", "delta.enableDeletionVectors": "true"}

EVENTS = Table(
    "events",
    "Who did what, to which item, when: one row per event, after validation and deduplication.",
    (
        Column("event_id", "string", "Unique id of the event; built by the source's mapping if the log has none."),
        Column("user_id", "string", "The user as the business knows them."),
        Column("item_id", "string", "The item of the event, as the business knows it."),
        Column("event_type", "string", "What was done: purchase, return, redeem_coupon, ..."),
        Column("event_ts", "timestamp", "When it was done, UTC."),
        Column("vertical", "string", "The line of business the event belongs to."),
        Column("amount", "double", "Amount of money, in the source's currency; negative for a return.", True),
        Column("quantity", "double", "How many or how much; negative for a return.", True),
        Column("time_zone", "string", "The user's IANA time zone, in which hour and weekday are computed."),
        Column("item_name", "string", "The item's human-readable name.", True),
        Column("category", "string", "The item's category within its vertical.", True),
        Column("basket_id", "string", "What was bought or done together.", True),
        Column("attributes", "map<string,string>", "Whatever else the source's mapping keeps.", True),
        Column("source", "string", "The source's mapping that read the event."),
    ),
    key=("event_id",),
    stage="ingest",
    cluster_by=("event_ts",),
    properties=_INCREMENTAL,
    personal=("basket_id",),  # often made of the customer and the day
    ages_by="event_ts",
)

REJECTED_EVENTS = Table(
    "rejected_events",
    "Records of a source that ingest rejected, each with the reason and the raw record.",
    (
        Column("source", "string", "The source's mapping that read the record."),
        Column("file", "string", "The file that the record comes from."),
        Column("user_id", "string", "The user, if the record names one; erase_users finds the record by it.", True),
        Column("reason", "string", "Why it was rejected: missing_user_id, bad_event_ts, broken_row, ..."),
        Column(
            "raw",
            "string",
            "The record as it was read: the raw line of a broken row, otherwise its columns as JSON.",
            True,
        ),
        Column("refused_on", "date", "The day (UTC) on which ingest rejected it."),
    ),
    key=(),
    stage="ingest",
    personal=("raw",),
    ages_by="refused_on",
)

FLAGGED_USERS = Table(
    "flagged_users",
    "Bots and test accounts: their events stay in events, but are left out of everything derived from it.",
    (
        Column("user_id", "string", "The user; one flagged day is enough to leave the user out."),
        Column("day", "date", "The day (UTC) whose events matched the rule."),
        Column("rule", "string", "events_per_minute, events_per_day, constant_interval or test_account."),
        Column(
            "value",
            "double",
            "The measured value: the most events in a minute, the day's events, or the longest run of events at a "
            "constant interval; for a test account, the day's events.",
        ),
    ),
    key=("user_id", "day", "rule"),
    stage="flag_users",
    properties=_INCREMENTAL,
)

EVENT_IN_SESSION = ("event_ts", "event_id", "item_id", "event_type", "vertical", "amount", "quantity", "time_zone")
_EVENT_TYPES = {column.name: column.type for column in EVENTS.columns}

SESSIONS = Table(
    "sessions",
    "Runs of a user's events, in order, without a pause longer than the gap, cut further by the rules of sessionize.",
    (
        Column(
            "session_id",
            "string",
            "Stable: the event_id of the session's first event. Only with ingest.duplicates = same_day can it occur "
            "on two days.",
        ),
        Column("user_id", "string", "The user."),
        Column("start_ts", "timestamp", "Time of the first event."),
        Column("end_ts", "timestamp", "Time of the last event."),
        Column("event_count", "int", "Number of events."),
        Column("verticals", "array<string>", "The distinct verticals, sorted."),
        Column("amount", "double", "Sum of the events' amounts; NULL if none has one.", True),
        Column(
            "events",
            f"array<struct<{','.join(f'{name}:{_EVENT_TYPES[name]}' for name in EVENT_IN_SESSION)}>>",
            "The events, in (event_ts, event_id) order.",
        ),
        Column(
            "run_start_ts",
            "timestamp",
            "Start of the run of events without a long pause that the session was cut from; usually equal to start_ts.",
        ),
    ),
    key=("session_id", "start_ts"),
    stage="sessionize",
    cluster_by=("start_ts",),
    properties=_INCREMENTAL,
    revision=2,
)

ITEMS = Table(
    "items",
    "The vocabulary of items. A number is assigned once and never reused: 0 is padding, 1 is unknown.",
    (
        Column("item_index", "int", "The item's number, from 2 on; it never changes and is never reused."),
        Column("item_id", "string", "The item as the business knows it."),
        Column("item_name", "string", "Its latest name.", True),
        Column("category", "string", "Its latest category.", True),
        Column(
            "vertical", "string", "The vertical of the event that gave the category; without a category, its latest."
        ),
        Column("unit_price", "double", "Its latest price above zero: amount / quantity.", True),
        Column("first_ts", "timestamp", "When it was first seen, among the events that are kept (maintain.keep_days)."),
        Column("event_count", "bigint", "Number of its events in the whole log."),
        Column(
            "train_count",
            "bigint",
            "Number of its events before valid_from, which decides whether it is in a model's vocabulary.",
        ),
        Column("target_count", "bigint", "How many of those are of the event types to predict."),
        Column(
            "said_ts",
            "struct<item_name:timestamp,category:timestamp,vertical:timestamp,unit_price:timestamp>",
            "When each of these values was last given.",
        ),
    ),
    key=("item_id",),
    stage="build_vocabulary",
    revision=2,
)

CONTEXT_VALUES = Table(
    "context_values",
    "Numbers of verticals, event types and categories, append-only like those of items: 0 is padding, 1 is unknown.",
    (
        Column("kind", "string", "vertical, event_type or category."),
        Column("value", "string", "The value; for a category, vertical/category."),
        Column("value_index", "int", "Its number, from 2 on, counted within the kind."),
    ),
    key=("kind", "value"),
    stage="build_vocabulary",
)

SEQUENCES = Table(
    "sequences",
    "What a model reads: up to N actions of a user, in order, as parallel lists of numbers, split by time.",
    (
        Column("user_id", "string", "The user."),
        Column("split", "string", "train, valid, test, or score (the row from which the user's vector is computed)."),
        Column("part", "int", "0 holds the newest actions before as_of, 1 the ones before those (train only), ..."),
        Column("as_of", "timestamp", "Every action in the row is strictly before this time."),
        Column("last_ts", "timestamp", "Time of the newest action in the row."),
        Column("length", "int", "Number of actions in the row."),
        Column("item_index", "array<int>", "Items; 1 if the item is not in the training window's vocabulary."),
        Column("event_type_index", "array<int>", "Event types (context_values)."),
        Column("vertical_index", "array<int>", "Verticals (context_values)."),
        Column(
            "gap_bucket",
            "array<int>",
            "Time since the user's previous action: 1 for the first ever, 2 for the same moment, then log2 seconds + "
            "3.",
        ),
        Column(
            "session_end",
            "array<int>",
            "2 at the last action of a session and at the row's newest action before the cut, otherwise 1.",
        ),
        Column("hour", "array<int>", "Hour in the user's zone, 1 to 24."),
        Column("weekday", "array<int>", "Weekday in the user's zone, 1 Sunday to 7 Saturday."),
        Column("price_bucket", "array<int>", "Unit price: 1 unknown, then half-octaves."),
        Column(
            "target_item_index",
            "array<int>",
            "valid/test: the items of the user's next actions within the window, in order.",
            True,
        ),
        Column("target_ts", "array<timestamp>", "valid/test: the times of those actions.", True),
        Column(
            "seen_item_index",
            "array<int>",
            "valid/test: items of which the user had an event of sequences.target_event_types in the last seen_days "
            "before as_of: they do not count as new.",
            True,
        ),
    ),
    key=("user_id", "split", "part"),
    stage="build_sequences",
    partition_by=("split",),
    properties={
        # Petastorm ignores deletion vectors, so train has files that have one rewritten before it reads them.
        "delta.enableDeletionVectors": "true",
        # score_users reads the change data feed to find users whose rows changed.
        "delta.enableChangeDataFeed": "true",
        # The row group is the unit that training processes hold and shuffle: 5,000 to 20,000 rows in files of any size.
        # Delta passes table properties to all writers, including MERGE and OPTIMIZE.
        "parquet.block.size": str(4 * 1024 * 1024),
    },
)

USER_EMBEDDINGS = Table(
    "user_embeddings",
    "One vector for every user, in the space of item_embeddings of the same model_version; those of old models are "
    "kept. Each reflects all that the user did until it was last updated: joined with labels of earlier days it knows "
    "what came after them (`trailvec probe` makes vectors as of each label).",
    (
        Column("user_id", "string", "The user."),
        Column("model_version", "string", "The model that computed the vector; never mix versions in a query."),
        Column(
            "as_of",
            "timestamp",
            "The moment after the user's last action, not when the vector was made. Don't join labels by it: "
            "`as_of <= label_ts` keeps only users who did nothing after the label (join by the night of your copy).",
        ),
        Column("history_length", "int", "Number of actions that the model read: the newest, if there were more."),
        Column(
            "is_cold",
            "boolean",
            "The model knows none of those actions' items: the vector is derived from their event types, verticals "
            "and times.",
        ),
        Column("vector", "array<float>", "The vector; its dot product with an item's is the model's own score."),
    ),
    key=("user_id", "model_version"),
    stage="score_users",
    partition_by=("model_version",),  # no deletion vectors: delta-rs and nearest_users read the plain files
)

CURRENT_MODEL = Table(
    "current_model",
    "The model whose rows the views current_* show: one row, changed once all users have their vector.",
    (Column("model_version", "string", "The model."),),
    key=("model_version",),
    stage="score_users",
)

USER_PROFILES = Table(
    "user_profiles",
    "A second vector for every user, for other teams' models; it does not lie in the items' space. Its dimensions "
    "change with each new model, so heads trained on it must be trained again; user_embeddings keeps its space.",
    (
        Column("user_id", "string", "The user."),
        Column(
            "model_version", "string", "The model whose state is part of the vector; never mix versions in a query."
        ),
        Column(
            "as_of",
            "timestamp",
            "The log's end when profile_users last ran: the vector reflects events strictly before this time.",
        ),
        Column(
            "vector",
            "array<float>",
            "State, items, amounts, words, categories, statistics and forecast, concatenated; their positions: "
            "models/<version>/profile.json.",
        ),
    ),
    key=("user_id", "model_version"),
    stage="profile_users",
    partition_by=("model_version",),
)

ITEM_EMBEDDINGS = Table(
    "item_embeddings",
    "One vector for every item of which a model knows anything, in the space of its user_embeddings: also for one that "
    "it never saw, if it knows the category, the vertical or the price.",
    (
        Column("item_id", "string", "The item."),
        Column("item_index", "int", "Its number."),
        Column("model_version", "string", "The model that computed the vector; never mix versions in a query."),
        Column("as_of", "timestamp", "The model was trained on events strictly before this time."),
        Column(
            "is_cold",
            "boolean",
            "The model never saw the item, or too rarely: the vector is derived from its category, vertical and price.",
        ),
        Column("vector", "array<float>", "The vector."),
    ),
    key=("item_id", "model_version"),
    stage="embed_items",
    partition_by=("model_version",),
)

EVALUATION = Table(
    "evaluation",
    "One row per metric of the model and of the baselines, overall and by slice, and per metric of the vectors "
    "themselves.",
    (
        Column("model_version", "string", "The model that was evaluated (the baselines' rows carry it too)."),
        Column("split", "string", "valid or test."),
        Column(
            "task",
            "string",
            "next: any item; new: items of which the user had no event of sequences.target_event_types in the last "
            "seen_days; repeat: the others. "
            "space: no ranking, the vectors themselves. drift: how far events and vectors moved from the cut to the "
            "log's end.",
        ),
        Column(
            "method",
            "string",
            "model, model_and_habit, popularity, own_frequency, item_knn; for task space: items, users, users_items; "
            "for drift: events, users, alarm.",
        ),
        Column(
            "metric",
            "string",
            "recall@10, recall@20: share of what the user did next that is among the 10 or 20 best; ndcg@10, ndcg@20: "
            "the same, higher ranks counting more, 1 is perfect; mrr@20: 1 / rank of the first hit, 0 if it is not "
            "among the 20 best; popularity_bias@10: mean log popularity of the recommended items minus that of the "
            "items acted on; coverage@10: share of the catalogue that is "
            "recommended to at least one user; model_lead_ndcg@10, model_and_habit_lead_ndcg@10: how far that "
            "method's ndcg@10 is above this row's method's. For task space: uniformity, alignment, dead_dimensions, "
            "effective_dimensions, norm_popularity, hubness@10, same_category@10, same_category_by_chance "
            "(jobs/space.py). For drift: stability_index (of the verticals' shares), new_items (share of events), "
            "rate (of a vertical: events after the cut per event in a period of the same length before it), cosine "
            "and centroid_cosine of users' vectors; for an alarm, the limit that was exceeded (evaluate.drift).",
        ),
        Column(
            "slice",
            "string",
            "all; or history: by the number of actions that the model read; hours: by the hours from the cut to the "
            "next action; vertical: by the vertical of the next actions (those in other verticals do not count there, "
            "nor do items without a number).",
        ),
        Column(
            "slice_value", "string", "all; or the class, such as 5-19, 24-72 (72 excluded) or 100+; or the vertical."
        ),
        Column("value", "double", "Mean over users; for coverage@10 and the tasks space and drift, the figure itself."),
        Column(
            "low",
            "double",
            "Lower end of the 95 % interval, by a bootstrap over users; NULL if the value is not a mean.",
            True,
        ),
        Column("high", "double", "Upper end of the interval.", True),
        Column(
            "counted",
            "bigint",
            "Number of users that the value covers; for task space, of vectors or pairs of them; for task drift, of "
            "events, except for the cosines of users' vectors.",
        ),
    ),
    key=("model_version", "split", "task", "method", "metric", "slice", "slice_value"),
    stage="evaluate",
    partition_by=("model_version",),
)

PROBES = Table(
    "probes",
    "How well a light head on frozen features predicts a label: a model's vectors compared with baselines.",
    (
        Column("model_version", "string", "The model whose vectors were probed (the baselines' rows carry it too)."),
        Column("task", "string", "What was predicted: a task of the labels, inactive, new_vertical or an event type."),
        Column(
            "features",
            "string",
            "vector, profile (that of user_profiles), majority, rfm (five numbers), tfidf_svd (the items), aggregates "
            "(counts over 1, 7 and 30 days and all time).",
        ),
        Column("head", "string", "logistic, boosting or mlp; for majority, prior."),
        Column("metric", "string", "auc or average_precision."),
        Column("value", "double", "Mean over the folds and the seeds."),
        Column(
            "std",
            "double",
            "Standard deviation over the seeds; with folds by time (label_ts), which are the same for all seeds, over "
            "the folds that contain both labels.",
        ),
        Column("users", "bigint", "Number of labelled users."),
        Column("positives", "bigint", "Number of those whose label is 1."),
    ),
    key=("model_version", "task", "features", "head", "metric"),
    stage="probe",
    partition_by=("model_version",),
)

NEIGHBOURS = Table(
    "neighbours",
    "The nearest items or users of an item or user.",
    (
        Column("model_version", "string", "The model whose vectors were compared."),
        Column(
            "kind",
            "string",
            "user_item (dot product), user_item_habit (dot product plus habit; jobs/habit.py), user_user or item_item "
            "(cosine); by the other metric if neighbours.metrics says so.",
        ),
        Column("source_id", "string", "The user or item whose neighbours are listed."),
        Column("rank", "int", "1 is the nearest."),
        Column("neighbour_id", "string", "The neighbour; never the source itself."),
        Column("score", "double", "Dot product (plus habit) or cosine."),
    ),
    key=("model_version", "kind", "source_id", "rank"),
    stage="find_neighbours",
    partition_by=("model_version", "kind"),
    users_in={"source_id": "old.kind LIKE 'user%'", "neighbour_id": "old.kind = 'user_user'"},
)

EXPORTS = Table(
    "exports",
    "Who was exported in which segment, and when: the log that the segments' frequency rules use.",
    (
        Column("export_id", "string", "The export, as named in its manifest.json; the same input gives the same id."),
        Column("segment", "string", "The segment's name."),
        Column("user_id", "string", "The user, as a plain id."),
        Column("is_control", "boolean", "The user was held back in the control group and is in no file."),
        Column("exported_at", "timestamp", "When the export was first made; repeating it logs nothing new."),
        Column("model_version", "string", "The model whose vectors were compared."),
        Column("destination", "string", "Where the files were written."),
    ),
    key=("export_id", "user_id"),
    stage="export_segments",
    ages_by="exported_at",
)

ERASURES = Table(
    "erasures",
    "The receipts of erase_users: one row per request, without user ids.",
    (
        Column(
            "erasure_id",
            "string",
            "The request: a keyed hash of who asked and of the users; the same request again has the same id.",
        ),
        Column("requested_by", "string", "Who asked for it, as given to the command."),
        Column("requested_at", "timestamp", "When the command first ran."),
        Column(
            "ids_digest",
            "string",
            "HMAC-SHA256 of all the users' hashes, sorted: proves which list it was without revealing it.",
        ),
        Column("users", "bigint", "How many users were to be erased."),
        Column("code_version", "string", "The code that last worked on it."),
        Column(
            "tables",
            "array<struct<table:string,rows:bigint,version_before:bigint,version_after:bigint>>",
            "Rows deleted from each table that holds users, and its Delta versions; the version before still holds "
            "them.",
            True,
        ),
        Column(
            "exports",
            "array<struct<segment:string,export_id:string,exported_at:timestamp,destination:string,users:bigint>>",
            "The exports that held some of the users, not as control: whoever has those files must be told.",
            True,
        ),
        Column("erased_at", "timestamp", "When no table showed the users any more; NULL: not complete yet.", True),
        Column(
            "finished_at",
            "timestamp",
            "When no file of any table held them any more (`trailvec erase_users --finish`).",
            True,
        ),
    ),
    key=("erasure_id",),
    stage="erase_users",
)

ERASED_USERS = Table(
    "erased_users",
    "Who was erased and must not come back: ingest drops their events.",
    (
        Column("user_hash", "string", "HMAC-SHA256 of the user_id, keyed with TRAILVEC_ERASE_KEY, hexadecimal."),
        Column("erasure_id", "string", "A request that named the user."),
        Column("erased_at", "timestamp", "When that request first ran."),
        Column(
            "key_mark", "string", "Fingerprint of the key, by which any other key is refused: its hash of a fixed text."
        ),
    ),
    key=("user_hash", "erasure_id"),
    stage="erase_users",
)

TABLES = (
    EVENTS,
    REJECTED_EVENTS,
    FLAGGED_USERS,
    SESSIONS,
    ITEMS,
    CONTEXT_VALUES,
    SEQUENCES,
    USER_EMBEDDINGS,
    USER_PROFILES,
    CURRENT_MODEL,
    ITEM_EMBEDDINGS,
    EVALUATION,
    PROBES,
    NEIGHBOURS,
    EXPORTS,
    ERASURES,
    ERASED_USERS,
)

# Views: for each table that keeps rows of several models, those of the current one. Spark runs the subquery first, so
# current_model is read before the table: a model that is current by then already has all its vectors, and keeps them
# until it is retired. find_neighbours runs after the switch, profile_users and probe on request: until then their views
# show no rows, and never another model's.
CURRENT = {f"current_{table.name}": table for table in TABLES if "model_version" in table.partition_by}
