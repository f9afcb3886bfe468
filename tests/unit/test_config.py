"""The configuration: what is wrong in it is one sentence, and `--set` takes what is meant."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from jobs.config import Config, load_config
from jobs.errors import TrailvecError


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            "maintain.keep_days={ evnets = 3 }",
            "maintain.keep_days: no table is named evnets; the nearest name is events",
        ),
        ("maintain.retention_hours_of={ sesions = 24 }", "no table is named sesions; the nearest name is sessions"),
        (
            "maintain.keep_days={ sessions = 3 }",
            "keep_days: the rows of sessions have no age; name only events, rejected_events, exports: correct it",
        ),
        (
            "sequences.valid_from=2012-01-02; sequences.test_from=2012-01-01",
            "sequences: valid_from = 2012-01-02 00:00:00 must not be after test_from = 2012-01-01 00:00:00: correct it",
        ),
        ("sequences.cut_step_days=36501", "cut_step_days = 36501: Input should be less than or equal to 36500"),
        ("sequences.seen_days=36501", "seen_days = 36501: Input should be less than or equal to 36500: correct it"),
        ("probe.days=1e9", "probe.days = 1000000000.0: Input should be less than or equal to 36500: correct it"),
        (
            "evaluate.gate=[{ task = 'nxt', method = 'model', metric = 'ndcg@10', at_least = 0.1 }]",
            "evaluate.gate.0.task = 'nxt': Input should be 'next', 'new', 'repeat', 'space' or 'drift': correct it",
        ),
        (
            "evaluate.gate=[{ task = 'new', method = 'model', metric = 'ndcg@10', at_least = 0.2, at_most = 0.1 }]",
            "evaluate.gate.0: no value is at_least = 0.2 and at_most = 0.1: correct it",
        ),
        (
            'neighbours.without=["purchase"]; neighbours.kinds=["item_item"]',
            "neighbours: without leaves items out of user_item, so kinds must contain user_item, or without be empty",
        ),
        ("sequences.valid_from=20111101", "sequences.valid_from: found 20111101, a number, where a time is expected"),
        ('sequences.valid_from="20111101"', "valid_from: found '20111101', a number, where a time is expected"),
        ("ingest.earliest=1.5e9", "ingest.earliest: found 1500000000.0, a number, where a time is expected"),
        (
            'neighbours.habit=true; neighbours.kinds=["item_item"]',
            "neighbours: habit = true adds to user_item, so kinds must contain user_item, or habit be false",
        ),
        (
            'neighbours.habit=true; neighbours.metrics={ user_item = "cosine" }',
            "neighbours: habit = true adds to dot products, so metrics.user_item must be dot, or habit be false",
        ),
        ("ingest.sources=5", 'ingest.sources = 5: write a list of texts in quotes, such as ["a", "b"]'),
        ("train.epochs=many", "train.epochs = 'many': Input should be a valid integer"),
        ("train.heads=3", "width must be a multiple of heads = 3, found 64"),
        ("train.loss=gbce", "gbce is calibrated for uniform negatives and needs negative_power = 0, found 1.0"),
        ("train.architecture=xlnet; train.heads=3; train.width=9", "xlnet needs an even width, found 9"),
        (
            "train.item_dropout=0.1; train.item_attributes=[]",
            "item_dropout = 0.1 needs item_attributes to fall back on, found none",
        ),
        ('train.inputs=["hour", "weekday", "hour"]', "train: inputs names 'hour' more than once: correct it"),
        ('train.item_attributes=["price", "price"]', "train: item_attributes names 'price' more than once"),
        ("train.seed=18446744073709551616", "train.seed = 18446744073709551616: Input should be less than 2147483648"),
        ("train.learning_rate=inf", "train.learning_rate = inf: Input should be a finite number"),
        ("train.weight_decay=inf", "train.weight_decay = inf: Input should be a finite number"),
        ("sessionize.gap_minutes=inf", "sessionize.gap_minutes = inf: Input should be a finite number"),
        ("ingest.future_tolerance_hours=1e8", "hours = 100000000.0: Input should be less than or equal to 876000"),
        ("sessionize.max_minutes=1e12", "sessionize.max_minutes = 1000000000000.0: Input should be less than or equal"),
        ("sessionize.gap_minutes_by_vertical={ food = nan }", "food = nan: Input should be a finite number"),
        ("sessionize.gap_minutes_by_vertical={ food = -5 }", "food = -5: Input should be greater than 0"),
        ("sessionize.midnight_of=Factory", "midnight_of: found 'Factory', which is not an IANA time zone"),
        ("sessionize.midnight_of=localtime", "midnight_of: found 'localtime', which is not an IANA time zone"),
        ("ingest.earliest=0001-01-01T00:00:00+05:00", "ingest.earliest: found a time outside the years 1 to 9999"),
        ("storage.root=~/trailvec", "root: found '~/trailvec', but ~ is not expanded here and has to be written out"),
        ("ingest.data_dir=~ann/logs", "ingest.data_dir: found '~ann/logs', but ~ is not expanded here"),
        ('storage.root=""', "storage.root = '': String should have at least 1 character"),
        ('ingest.data_dir=""', "ingest.data_dir = '': String should have at least 1 character"),
        ("maintain.keep_days={ events = 99999999 }", "events = 99999999: Input should be less than or equal to 36500"),
        ("storage.root.a=b", "storage.root = { ... }: Input should be a valid string"),
        (
            'spark.conf."spark.sql.session.timeZone"="Europe/Berlin"',
            "spark.conf: found spark.sql.session.timeZone = 'Europe/Berlin', which must be UTC, since the rows "
            "depend on it: correct it",
        ),
        ('spark.conf."spark.sql.ansi.enabled"="true"', "spark.sql.ansi.enabled = 'true', which must be false"),
        ('spark.conf."spark.sql.parquet.inferTimestampNTZ.enabled"="false"', "enabled = 'false', which must be true"),
        ('spark.conf."spark.sql.timestampType"="TIMESTAMP_NTZ"', "TIMESTAMP_NTZ', which must be TIMESTAMP_LTZ"),
        (
            "spark.conf.spark.executor.memory=4g",
            "spark.conf: found a section spark: a key that contains dots must be in quotes, as in "
            'spark.conf."spark.executor.memory" = "4g": correct it',
        ),
        ("probe.heads=mlp", 'probe.heads = \'mlp\': write a list of texts in quotes, such as ["a", "b"]'),
        (
            "neighbours.metrics=[dot]",
            "metrics = '[dot]': write a table with its texts in quotes, such as { a = \"b\" }",
        ),
        ("maintain.keep_days=5", "maintain.keep_days = 5: write a table of numbers, such as { a = 30 }"),
        ("maintain.retention_hours_of=a", "maintain.retention_hours_of = 'a': write a table of numbers, such as"),
        ("sessionize.gap_minutes_by_vertical=5", "gap_minutes_by_vertical = 5: write a table of numbers, such as"),
        ("spark.conf=x", "spark.conf = 'x': write a table with its texts in quotes, such as { a = \"b\" }"),
        (
            "evaluate.gate={ task = 'next' }",
            "evaluate.gate = { ... }: write a list of tables, such as [{ task = ... }], or each of them below "
            "[[evaluate.gate]] (known keys: task, method",
        ),
        ("storage.database=a-b", "storage.database: found 'a-b', which must consist of letters (a-z, A-Z), digits and"),
        ("storage.database=1a", "storage.database: found '1a', which must consist of letters (a-z, A-Z), digits and"),
        (
            "flag_users.test_accounts=['a', 'qa\\x']",
            "test_accounts.1: found 'qa\\\\x', which must not be empty, and have a backslash only before _, % or",
        ),
        ("flag_users.test_accounts=['']", "test_accounts.0: found '', which must not be empty, and have a backslash"),
        (
            'spark.conf={ master = "local[1]" }',
            "spark.conf: found master, which has no dot, so it is no setting of Spark",
        ),
        ("train.epochs=true", "train.epochs: found true or false where a number is expected: correct it"),
        ("ingest.max_rejected_share=true", "max_rejected_share: found true or false where a number is expected"),
        ("sessionize.max_minutes=false", "sessionize.max_minutes: found true or false where a number is expected"),
        ("maintain.keep_days={ events = true }", "maintain.keep_days: found true or false where a number is expected"),
        ("modle.version=a", "unknown key modle; did you mean model?"),
        (
            "flag_users.events_per_day=9223372036854775807",
            "Input should be less than or equal to 1000000000: correct it",
        ),
        (
            "train.tracking_uri=https://bot:open@mlflow.shop",
            "tracking_uri contains a user, a password or a key, which belong in",
        ),
        *[
            (f"train.tracking_uri={uri}", "tracking_uri contains a user, a password or a key, which belong in")
            for uri in (
                "postgresql:///mlflow?host=db&user=bot&password=open",
                "mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BUID%3Dbot%3BP%57D%3Dopen",
            )
        ],
        ("train.max_length=50", "unknown key train.max_length; max_length belongs below [sequences]"),
        ("score.max_users=5", "unknown key score.max_users; max_users belongs below [evaluate] or below [probe]"),
        ("epochs=2", "unknown key epochs; epochs belongs below [train]"),
        ("probe.seed=3", "unknown key probe.seed; did you mean seeds?"),
        ("gate=[{ task = 'next' }]", "unknown key gate; gate belongs below [evaluate]"),
        ("evaluate.at_least=1", "unknown key evaluate.at_least; at_least belongs below [[evaluate.gate]]"),
        ("extend=base.toml", "unknown key extend; did you mean extends?"),
        ("extends=base.toml", "unknown key extends; extends belongs above the first [heading]"),
        ("spark.spark.driver.memory=3g", "unknown key spark.spark; known keys: master, conf"),
        ("evaluate.drift.split=valid", "unknown key evaluate.drift.split; split belongs below [evaluate]"),
        ("evaluate.train=3", "unknown key evaluate.train; "),
        (
            "export.consent=consent.csv",
            "export.consent = 'consent.csv': write a table, such as { file = ... } (known keys: file, sql)",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(assignments: str, said: str) -> None:
    with pytest.raises(TrailvecError) as error:
        load_config(None, assignments.split("; "))
    assert str(error.value).startswith("the settings: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_users_with_cuts_of_their_own_does_not_grow() -> None:
    """A user who acted since would count as one who did not."""
    sets = ["train.warm_start=true", "sequences.split_by=leave_one_out"]
    assert all(load_config(None, [alone]) for alone in sets)
    with pytest.raises(
        TrailvecError, match=r"settings: train\.warm_start = true .* so one of the two must go: correct it"
    ):
        load_config(None, sets)


def test_a_time_is_taken_in_every_way_to_write_it() -> None:
    for text in ("2011-11-01", '"2011-11-01"', "2011-11-01T00:00:00", "2011-11-01T01:00:00+01:00"):
        assert load_config(None, [f"sequences.valid_from={text}"]).sequences.valid_from == datetime(2011, 11, 1)


@pytest.mark.parametrize("version", ["604812345678", "0123456789ab", "12345678e901", "2011-11-01", "true", '"a"'])
def test_what_is_set_as_a_string_is_kept_as_it_is_written(version: str) -> None:
    assert load_config(None, [f"model.version={version}"]).model.version == version.strip('"')


def test_a_quoted_part_of_a_key_may_have_dots() -> None:
    sets = ['spark.conf."spark.executor.memory"="4g"', "spark.conf.'spark.executor.cores'=4", "train.epochs = 2"]
    config = load_config(None, sets)
    assert config.spark.conf == {"spark.executor.memory": "4g", "spark.executor.cores": "4"}
    assert config.train.epochs == 2


def test_a_section_is_not_replaced_in_whole(tmp_path: Path) -> None:
    """What the file has set in it would be lost without a word."""
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nbatch_size = 7\n[probe]\nlabels = { file = "a.csv" }\n[evaluate.drift]\nmin_events = 7')
    for assignment, example in (
        ("train={ epochs = 1 }", "train.epochs"),
        ("evaluate.drift={}", "evaluate.drift.max_stab"),
    ):
        name = assignment.partition("=")[0]
        with pytest.raises(TrailvecError, match=f"{name} is a section, .* by itself, such as --set {example}"):
            load_config(file, [assignment])
    # A list of users is either a file or a query: the other goes.
    labels = load_config(file, ['probe.labels={ sql = "SELECT 1" }']).probe.labels
    assert labels is not None
    assert (labels.file, labels.sql) == (None, "SELECT 1")


def test_a_file_extends_the_one_beside_it_or_else_trailvecs_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('\ufeffextends = "base.toml"\n[vocabulary]\nmin_count = 3')  # as on Windows
    config = load_config(tmp_path / "mine.toml")
    assert (config.vocabulary.min_count, config.sequences.max_length) == (3, 256)
    (tmp_path / "base.toml").write_text("[sequences]\nmax_length = 7")
    config = load_config(tmp_path / "mine.toml")
    assert (config.vocabulary.min_count, config.sequences.max_length) == (3, 7)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(TrailvecError) as error:
            load_config(tmp_path / "mine.toml")
        return str(error.value).replace(f"{tmp_path}/", "")

    (tmp_path / "other.toml").write_text('extends = "mine.toml"')
    assert refused('extends = "mine.toml"').startswith("mine.toml: extends = 'mine.toml' leads back to a file that")
    assert refused('extends = "other.toml"').startswith("other.toml: extends = 'mine.toml' leads back to a file that")
    assert refused('extends = ["other.toml"]').startswith("mine.toml: extends = ['other.toml']: name one file")
    assert refused('extends = "none.toml"').startswith("mine.toml: extends = 'none.toml', which is neither beside it")
    with pytest.raises(TrailvecError, match=r"can't be read \(Is a directory\): correct the path$"):
        load_config(tmp_path)


def test_every_key_is_explained() -> None:
    sections = Config.model_json_schema()["$defs"]
    assert {"TrainSettings", "GateSettings", "UserList"} < sections.keys()
    keys = {f"{name}.{key}": said for name, of in sections.items() for key, said in of["properties"].items()}
    # A section inside a section ($ref) is explained by its own keys.
    assert [key for key, said in keys.items() if "description" not in said and "$ref" not in said] == []
