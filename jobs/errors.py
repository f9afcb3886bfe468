"""The one exception that is meant for users, and the translation of Spark's errors into it."""

from __future__ import annotations

import re


class TrailvecError(Exception):
    """One sentence: what was wrong, where, what was found, what to do. Printed without a stack trace."""


# A file of one of our Delta tables, by its place and Delta's file names; groups: the table, the file in its folder.
_FILE = r"/((?:[^\n]*/)?(?:part|cdc)-\d{5}-[0-9a-f-]{36}\S*?\.parquet)"
_MADE_AGAIN = (
    "flagged_users|sessions|sequences|item_embeddings|user_embeddings|user_profiles|neighbours|evaluation|probes"
)
# No stage makes these again (of the first two, ingest only what the sources still hold).
ONLY_HERE = (
    "events",
    "rejected_events",
    "items",
    "context_values",
    "current_model",
    "exports",
    "erasures",
    "erased_users",
)
_ONLY_HERE = "|".join(ONLY_HERE)
_OWN_FILE = rf"/tables/({_MADE_AGAIN}|{_ONLY_HERE}){_FILE}"
# Spark takes a file's name for read as soon as it has planned a batch with it, whether the batch then fails or not.
FETCH_AGAIN = "fetch it again, or take it out of the folder (a good copy that comes later needs another name)"
ANOTHER_INGEST = r"Multiple streaming (?:jobs|queries)"
_DAMAGED = r"(?: is not a Parquet file|\. Please)"

# (pattern of Spark's message, what to tell the user); {0} is the first group of the pattern.
_SPARK_MESSAGES = (
    (r"jobs\.errors\.TrailvecError: ([^\n]+)", "{0}"),  # ours, raised in a Python worker or by raise_error
    (
        r"\[INVALID_PANDAS_UDF_PLACEMENT\] The group aggregate pandas UDF `(\w+)`",
        "{0} can't be used beside Spark's own aggregates in one SELECT: put it in its own SELECT and join the two",
    ),
    (
        r"\[PATH_NOT_FOUND\] Path does not exist: ([^\n]+?)\.?(?:\n|$)",
        "{0} does not exist: correct the path in the query or mapping",
    ),
    (
        r'No FileSystem for scheme "?(\w+)',
        "Hadoop knows no {0}:// here: correct the path (on S3 it begins with s3a://), or add that store's jars",
    ),
    (
        r"URISyntaxException: Relative path in absolute URI: \.?([^\n]+?)(?:\.crc)?(?:\n|$)",
        "{0}: Hadoop can't read a file with a colon in its name, nor a pattern's other files beside it: rename it",
    ),
    (
        rf"/tables/({_MADE_AGAIN}|{_ONLY_HERE})/(_change_data/[^\n]*?\.parquet){_DAMAGED}",
        "{1} of table {0}, which holds only changes, is damaged: run this stage once with --force (erase_users "
        "--finish: run it after maintain_tables has removed the file)",
    ),
    (
        rf"/tables/({_MADE_AGAIN}){_FILE}{_DAMAGED}",
        "{1} of table {0} is damaged: restore it from a backup (never delete only this file), or move the table's "
        "folder away and run the stage that creates it",
    ),
    (
        _OWN_FILE + _DAMAGED,
        "{1} of table {0} is damaged: restore it from a backup (never delete only this file, nor move the table away: "
        "its rows are stored nowhere else)",
    ),
    (
        r"Could not read footer for file: ([^\n]+?)\. Please",
        f"{{0}} is not a complete Parquet file (truncated?): {FETCH_AGAIN}",
    ),
    (
        r"Parquet column cannot be converted in file (\S+?)\. Column: \[([^\]]*)\], Expected: (\w+), Found: (\w+)",
        "{0}: column {1} is {3}, but {2} in the files beside it: give it the same type, or the file its own input",
    ),
    (
        r"RuntimeException: ([^\n]+?) is not a Parquet file",
        f"{{0}} is not a complete Parquet file (truncated?): {FETCH_AGAIN}",
    ),
    (
        # gzip's message, bzip2's; Spark does not say which file
        r"EOFException: Unexpected end of input stream|IOException: unexpected end of stream(?:\n|$)",
        f"a compressed input file is truncated (gzip -t FILE or bzip2 -t FILE tells which): {FETCH_AGAIN}",
    ),
    (
        r"Encountered error while reading file (\S+?)\. Details:.*IOException: (not a gzip file|incorrect \w+ check)",
        f"{{0}} is not compressed as its name says ({{1}}): {FETCH_AGAIN}",
    ),
    (
        r"native zStandard library not available",
        "Hadoop can't read .zst files here, and the input has one: compress it with gzip or bzip2",
    ),
    (
        r"AccessControlException: (Permission denied[^\n]*)",
        "{0}: run as a user with this permission, or ask the owner to grant it",
    ),
    (
        r"ConnectException: Call From \S+ to (\S+)[^\n]*",
        "{0} does not answer: start it, or correct the host and port in storage.root, ingest.data_dir, the path given "
        "or HADOOP_CONF_DIR",
    ),
    (
        r"UnknownStoreException: `?(s3a://[^/'`]+)",
        "{0} is not a bucket of this store: create it, or correct storage.root, ingest.data_dir, the path given or the "
        "store's endpoint",
    ),
    (
        r"NoAuthWithAWSException|No AWS Credentials provided",
        "the environment has no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and this machine has no role: export both",
    ),
    (
        r"AccessDeniedException: (s3a://[^\n]+?):",
        "{0}: the store refuses the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or this operation with "
        "them: correct the keys, or grant the permission (docs/operations.md)",
    ),
    (
        r"Class org\.apache\.hadoop\.fs\.s3a\.S3AFileSystem not found",
        "s3a:// needs Hadoop's jars for S3, which are not on Spark's class path: set spark.driver.extraClassPath as in "
        "conf/s3.toml",
    ),
    (
        r"\[COLUMN_ALREADY_EXISTS\] The column ([^\n]+?) already exists",
        "several columns are named {0} (ignoring case): give each its own name, the same in all files of an input",
    ),
    (
        r"Illegal Parquet type: INT(?:64|96) \(TIMESTAMP\(NANOS",  # Spark does not say which file
        "an input Parquet file has times in nanoseconds, which Spark can't read: write it again with "
        'coerce_timestamps="us" (pandas, pyarrow)',
    ),
    (
        r"Timed out waiting for a node assignment|Failed to create new KafkaAdminClient",
        "no connection to a Kafka broker: start it, or correct bootstrap_servers and what the input's "
        "kafka.options say of credentials",
    ),
    (
        r"UnknownTopicOrPartitionException",
        "the Kafka broker has no such topic: create it, or correct the input's topic",
    ),
    (
        r"Cannot fetch offset (\d+) \(GroupId: [^)]*?TopicPartition: ([^)\s]+)\)",
        "records of {1} from offset {0} on were removed from the topic before they were read: set "
        'failOnDataLoss = "false" in the input\'s kafka.options to continue without them',
    ),
    (
        r"Partition (\S+?)(?:'s)? offset was changed from",  # to a lower one
        "{0} holds fewer records than were read from it: the topic was recreated, or is another cluster's; run "
        "`trailvec ingest --force` once, which reads all of it, or give the input another `name`",
    ),
    (
        # Spark says this of partitions that had been read, before it compares the others' offsets
        r"\(([^()]*)\) are gone",
        "partitions {0} are gone: the topic was recreated with fewer, or is another cluster's; run `trailvec "
        "ingest --force` once, which reads all of it, or give the input another `name`",
    ),
    (
        r"data may have been (?:lost|missed)",
        'records were removed from the topic before they were read: set failOnDataLoss = "false" in the input\'s '
        "kafka.options to continue without them",
    ),
    (
        ANOTHER_INGEST,
        "another ingest is reading the same input: run this one again when that one has ended; nothing is lost",
    ),
    (
        r"DELTA_(?:CONCURRENT|METADATA_CHANGED|PROTOCOL_CHANGED)|"
        r"(?:Concurrent(?:Append|Write|DeleteRead|DeleteDelete|Transaction)|MetadataChanged|ProtocolChanged)Exception",
        "another job wrote to the same table at the same time: run this stage again",
    ),
    (
        rf"FileNotFoundException: [^\n]*{_OWN_FILE}",  # the rest differs between file systems
        "{1} of table {0} is gone: a VACUUM deleted what this stage continues from (was maintain.retention_hours "
        "raised, or VACUUM run by hand?): run the stage once with --force; if that stops at the same file, the table "
        "itself lacks it: restore it from a backup",
    ),
    (
        r"No space left on device",
        "the disk is full: free some space and run this stage again; nothing already committed is lost",
    ),
    (
        # Java's own, a crashed Python worker, a lost driver JVM (two messages, both py4j's), a killed YARN container.
        r"(?:java\.lang\.|Spark)OutOfMemoryError|exited unexpectedly \(crashed\)|Answer from Java side is empty|"
        r"^\[Errno 111\] Connection refused$|Exit status: (?:137|143)",
        "a Spark process was lost or ran out of memory: increase spark.driver.memory or spark.executor.memory, and "
        "memoryOverhead (docs/sizing.md), and run this stage again; nothing already committed is lost",
    ),
    (
        r"Checkpoint block \S+ not found",  # of localCheckpoint
        "a machine that held rows computed by this stage is gone: run the stage again; nothing already committed is "
        "lost",
    ),
    (
        r"\[DELTA_TABLE_NOT_FOUND\] ([^\n]+?)\.?(?:\n|$)",
        "{0}: run the stage that creates it; if another job is creating it now, run this one again",
    ),
    (
        r"No module named '(torch|horovod|petastorm|transformers4rec)\b",
        "{0} is not installed in the Python that runs this stage: training and scoring need one with requirements.lock "
        "and Horovod (on YARN: TRAILVEC_ENVIRONMENT, scripts/submit_yarn.sh)",
    ),
    (
        r"Could not resolve `(nearest_(?:items|users))` to a table-valued function",
        "{0} reads the tables' files itself and needs them on a local disk, which storage.root is not: read the view "
        "current_neighbours instead",
    ),
    (r"\[(?:TABLE_OR_VIEW_NOT_FOUND|UNRESOLVED_COLUMN)[^\]]*\] ([^\n]+)", "{0}"),
    (r"\[(?:PARSE_SYNTAX_ERROR)[^\]]*\] ([^\n]+)", "the SQL can't be parsed: {0}"),
    # What only fails at run time: patterns, zones and positions that a mapping or a query gives to an expression.
    (
        r"((?:Unknown|Illegal) pattern (?:letter|character): \S|Fail to recognize '[^'\n]*' pattern|"
        r"(?:Too many pattern letters|Pattern ends with an incomplete string literal|All week-based patterns)[^\n]*)",
        "the SQL fails: {0}: correct it",
    ),
    (
        r"(?:PatternSyntaxException:|ZoneRulesException:|\[INVALID_[A-Z_.]+\]) ([^\n]+)",
        "the SQL fails: {0}: correct it",
    ),
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, after py4j's own line, which only names a call. If the message gives
    causes, the last one instead, whether Java's or Python's in a worker. "" if there is no message."""
    text = str(error).strip()
    _, trace, of_python = text.rpartition("Traceback (most recent call last):\n")
    raised = re.search(r"^\w[\w.]*: .+", of_python, re.MULTILINE) if trace else None
    if found := [raised[0]] if raised else re.findall(r"^Caused by: (.+)", text, re.MULTILINE):
        return str(found[-1])
    lines = text.splitlines()
    if len(lines) > 1 and lines[0].startswith("An error occurred while calling"):
        lines = lines[1:]
    return next(iter(lines), "").removeprefix(": ")


def one_sentence(error: BaseException) -> str:
    """What to say about an error that is not ours: `explain`'s sentence, else its first line."""
    return explain(error) or first_line(error)


def explain(error: BaseException) -> str | None:
    """The one-sentence form of a known Spark or JVM error; None if it is not known."""
    text = re.sub(r" SQLSTATE: \w+", "", str(error))  # Databricks appends it to Spark's messages
    for pattern, sentence in _SPARK_MESSAGES:
        if found := re.search(pattern, text, re.DOTALL):
            return sentence.format(*found.groups())
    return None
