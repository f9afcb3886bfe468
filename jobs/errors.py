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
_ONLY_HERE = "events|rejected_events|items|context_values|current_model|exports|erasures|erased_users"
_OWN_FILE = rf"/tables/({_MADE_AGAIN}|{_ONLY_HERE}){_FILE}"
_DAMAGED = r"(?: is not a Parquet file|\. Please)"

# (pattern of Spark's message, what to tell the user); {0} is the first group of the pattern.
_SPARK_MESSAGES = (
    (r"jobs\.errors\.TrailvecError: ([^\n]+)", "{0}"),  # ours, raised in a Python worker or by raise_error
    (
        r"\[INVALID_PANDAS_UDF_PLACEMENT\] The group aggregate pandas UDF `(\w+)`",
        "{0} can't stand beside Spark's own aggregates in one SELECT: give it a SELECT of its own and join the two",
    ),
    (
        r"\[PATH_NOT_FOUND\] Path does not exist: (\S+?)\.?(?:\s|$)",
        "{0} does not exist: correct the path in the source's file",
    ),
    (
        r"URISyntaxException: Relative path in absolute URI: \.?([^\n]+?)(?:\.crc)?(?:\n|$)",
        "{0}: Hadoop reads no file with a colon in its name, nor a pattern's files beside it: rename it",
    ),
    (
        rf"/tables/({_MADE_AGAIN}|{_ONLY_HERE})/(_change_data/[^\n]*?\.parquet){_DAMAGED}",
        "{1} of table {0}, which holds changes alone, is damaged: run this stage once with --force (erase_users "
        "--finish: once maintain_tables has removed it)",
    ),
    (
        rf"/tables/({_MADE_AGAIN}){_FILE}{_DAMAGED}",
        "{1} of table {0} is damaged: put it back from a backup (never delete it alone), or move the table's folder "
        "away and run the stage that makes it",
    ),
    (
        _OWN_FILE + _DAMAGED,
        "{1} of table {0} is damaged: put it back from a backup (never delete it alone, nor move the table away: what "
        "it says stands nowhere else)",
    ),
    (
        r"Could not read footer for file: (\S+?)\. Please",
        "{0} is not a whole Parquet file (truncated?): fetch it again or take it out of the folder",
    ),
    (
        r"Parquet column cannot be converted in file (\S+?)\. Column: \[([^\]]*)\], Expected: (\w+), Found: (\w+)",
        "{0}: column {1} is {3}, in the files beside it {2}: give it the same type or an input of its own",
    ),
    (
        r"(\S+) is not a Parquet file",
        "{0} is not a whole Parquet file (truncated?): fetch it again or take it out of the folder",
    ),
    (
        # gzip's message, bzip2's; Spark does not say which file
        r"EOFException: Unexpected end of input stream|IOException: unexpected end of stream(?:\n|$)",
        "a compressed file of the input is cut short (gzip -t FILE, bzip2 -t FILE tell which): fetch it again or take "
        "it out of the folder",
    ),
    (
        r"Encountered error while reading file (\S+?)\. Details:.*IOException: (not a gzip file|incorrect \w+ check)",
        "{0} is not packed as its name says ({1}): fetch it again or take it out of the folder",
    ),
    (
        r"native zStandard library not available",
        "Hadoop reads no .zst file here, and the input has one: pack it by gzip or bzip2",
    ),
    (
        r"AccessControlException: (Permission denied[^\n]*)",
        "{0}: run as a user who may, or have the owner allow it",
    ),
    (
        r"ConnectException: Call From \S+ to (\S+)[^\n]*",
        "{0} does not answer: bring it up, or correct the host and port in storage.root, ingest.data_dir or "
        "HADOOP_CONF_DIR",
    ),
    (
        r"UnknownStoreException: `?(s3a://[^/'`]+)",
        "{0} is no bucket of this store: make it, or correct storage.root, ingest.data_dir or the store's endpoint",
    ),
    (
        r"NoAuthWithAWSException|No AWS Credentials provided",
        "the environment has no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and this machine no role: export both",
    ),
    (
        r"AccessDeniedException: (s3a://\S+?):",
        "{0}: the store refuses the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what was done with them: "
        "correct them, or allow it (docs/operations.md)",
    ),
    (
        r"Class org\.apache\.hadoop\.fs\.s3a\.S3AFileSystem not found",
        "s3a:// needs Hadoop's jars for S3, which are not on Spark's class path: set spark.driver.extraClassPath as in "
        "conf/s3.toml",
    ),
    (
        r"\[COLUMN_ALREADY_EXISTS\] The column (\S+) already exists",
        "several columns are named {0} (case makes no difference): give each a name of its own, the same in all files "
        "of an input",
    ),
    (
        r"Illegal Parquet type: INT(?:64|96) \(TIMESTAMP\(NANOS",  # Spark does not say which file
        "a Parquet file of the input has times in nanoseconds, which Spark can't read: write it again with "
        'coerce_timestamps="us" (pandas, pyarrow)',
    ),
    (
        r"Cannot fetch offset (\d+) \(GroupId: [^)]*?TopicPartition: ([^)\s]+)\)",
        "records of {1} from offset {0} on are gone from the topic before they were read: set "
        'failOnDataLoss = "false" in the input\'s kafka.options to go on without them',
    ),
    (
        r"Partition (\S+?)(?:'s)? offset was changed from",  # to a lower one
        "{0} holds fewer records than were read of it: the topic was made anew, or is another cluster's; run "
        "`trailvec ingest --force` once, which reads all of it, or give the input another `name`",
    ),
    (
        r"data may have been (?:lost|missed)",
        'records are gone from the topic before they were read: set failOnDataLoss = "false" in the input\'s '
        "kafka.options to go on without them",
    ),
    (
        r"Multiple streaming (?:jobs|queries)",
        "another ingest reads the same input right now: run this one again when it has ended; nothing is lost",
    ),
    (
        r"DELTA_CONCURRENT|Concurrent(?:Append|Write|DeleteRead|DeleteDelete|Transaction)Exception",
        "another job wrote to the same table at the same time: run this stage again",
    ),
    (
        rf"FileNotFoundException: [^\n]*{_OWN_FILE}",  # the rest differs between file systems
        "{1} of table {0} is gone: a VACUUM took what this stage goes on from (was maintain.retention_hours raised, or "
        "VACUUM run by hand?): run it once with --force",
    ),
    (
        r"No space left on device",
        "the disk is full: free some space and run this stage again; nothing already committed is lost",
    ),
    (
        # Java's own, a crashed Python worker, a lost driver JVM (two messages, both py4j's), a killed YARN container.
        r"(?:java\.lang\.|Spark)OutOfMemoryError|exited unexpectedly \(crashed\)|Answer from Java side is empty|"
        r"^\[Errno 111\] Connection refused$|Exit status: (?:137|143)",
        "a process of Spark's was lost or ran out of memory: give spark.driver.memory or spark.executor.memory (and "
        "memoryOverhead) more (docs/sizing.md), and run this stage again; nothing already committed is lost",
    ),
    (
        r"Checkpoint block \S+ not found",  # of localCheckpoint
        "a machine that held rows which this stage had made is gone: run it again; nothing already committed is lost",
    ),
    (
        r"\[DELTA_TABLE_NOT_FOUND\] ([^\n]+?)\.?(?:\n|$)",
        "{0}: run the stage that makes it; if another job is making it right now, run this one again",
    ),
    (
        r"No module named '(torch|horovod|petastorm|transformers4rec)\b",
        "{0} is not in the Python that runs this stage: training and scoring want one with requirements.lock and "
        "Horovod (on YARN: TRAILVEC_ENVIRONMENT, scripts/submit_yarn.sh)",
    ),
    (r"\[(?:TABLE_OR_VIEW_NOT_FOUND|UNRESOLVED_COLUMN)[^\]]*\] ([^\n]+)", "{0}"),
    (r"\[(?:PARSE_SYNTAX_ERROR)[^\]]*\] ([^\n]+)", "the SQL can't be read: {0}"),
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


def told(error: BaseException) -> str:
    """What to say about an error that is not ours: `explain`'s sentence, else its first line."""
    return explain(error) or first_line(error)


def explain(error: BaseException) -> str | None:
    """The one-sentence form of a known Spark or JVM error; None if it is not known."""
    text = str(error)
    for pattern, sentence in _SPARK_MESSAGES:
        if found := re.search(pattern, text, re.DOTALL):
            return sentence.format(*found.groups())
    return None
