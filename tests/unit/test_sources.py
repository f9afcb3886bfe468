"""The mapping files: what parses, what does not, and the sentence that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import TrailvecError
from jobs.sources import Columns, load_source
from jobs.tables import EVENTS

SHIPPED = sorted(Path("conf/sources").glob("*.toml"))

GOOD = """
name = "shop"

[[input]]
path = "orders.csv"
format = "csv"

[input.columns]
event_id = { columns = ["order", "line"] }
user_id = "customer"
item_id = { column = "sku", default = "none" }
event_type = { constant = "purchase" }
event_ts = { column = "at", zone = "Europe/London" }
vertical = { expr = "upper(department)" }

[[input.reject]]
reason = "test_order"
when = "customer = 'test'"
"""


def _load(tmp_path: Path, old: str = "", new: str = "") -> None:
    assert old in GOOD
    path = tmp_path / "shop.toml"
    path.write_text(GOOD.replace(old, new) if old else GOOD)
    load_source(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_mappings_parse_and_bear_the_name_of_their_file(path: Path) -> None:
    assert load_source(path).name == path.stem


def test_three_mappings_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == ["completejourney", "online_retail", "superapp"]


def test_a_mapping_can_say_every_column_of_the_contract() -> None:
    # attributes is a list beside the columns, source is the mapping's own name.
    assert set(Columns.model_fields) | {"attributes", "source"} == {column.name for column in EVENTS.columns}
    optional = {name for name, field in Columns.model_fields.items() if not field.is_required()}
    # Delta's log keeps a file's smallest and largest value for longer than the file.
    assert {"user_id", "basket_id"}.isdisjoint(EVENTS.statistics_columns())
    nullable = {column.name for column in EVENTS.columns if column.nullable}
    assert optional == (nullable - {"attributes"}) | {"time_zone"}  # its default is UTC


def test_columns_and_expressions_are_collected(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text(GOOD.replace('format = "csv"', 'format = "csv"\nattributes = ["store", "at"]'))
    mapping = load_source(path).input[0]
    assert mapping.column_names() == ["customer", "sku", "at", "order", "line", "store"]
    assert mapping.expressions() == ["upper(department)", "customer = 'test'"]


def test_identical_records_of_a_topic_cannot_be_numbered(tmp_path: Path) -> None:
    topic = GOOD.replace('path = "orders.csv"', 'kafka = { bootstrap_servers = "h:1", topic = "t" }')
    topic = topic.replace('format = "csv"', 'format = "json"')
    path = tmp_path / "shop.toml"
    path.write_text(topic)
    load_source(path)
    path.write_text(topic.replace('"line"] }', '"line"], ordinal = true }'))
    with pytest.raises(
        TrailvecError, match=r"event_id\.ordinal numbers the identical records of a file, which a topic"
    ):
        load_source(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('path = "orders.csv"', "", "input.0: needs either path or kafka"),
        (
            'path = "orders.csv"',
            'kafka = { bootstrap_servers = "h:1", topic = "t" }',
            "format = csv, but a topic's values are JSON and need no format",
        ),
        (
            'path = "orders.csv"',
            'kafka = { bootstrap_servers = "h:1", topic = "t", '
            'options = { startingOffsets = "earliest", startingoffsets = " Latest" } }',
            "input.0.kafka: startingOffsets = Latest may be another place whenever the topic is read again: give a",
        ),
        (
            'path = "orders.csv"',
            """kafka = { bootstrap_servers = "h", topic = "t", options = { startingOffsets = '{"t":{"1":-1}}' } }""",
            'input.0.kafka: startingOffsets = {"t":{"1":-1}} may be another place whenever the topic is read',
        ),
        (
            'path = "orders.csv"',
            'kafka = { bootstrap_servers = "h", topic = "t", options = { startingOffsets = "${BEGIN}" } }',
            "input.0.kafka: startingOffsets = ${BEGIN} may be another place whenever the topic is read",
        ),
        ('path = "orders.csv"', 'pth = "orders.csv"\npath = "x"', "unknown key input.0.pth; did you mean path?"),
        ("user_id =", "usr_id =", "unknown key input.0.columns.usr_id; did you mean user_id?"),
        (
            "user_id =",
            'ignore = ["x"]\nuser_id =',
            "unknown key input.0.columns.ignore; ignore belongs below [[input]]",
        ),
        ("user_id =", 'default = "x"\nuser_id =', "unknown key input.0.columns.default; known keys: event_id, user_id"),
        ("zone =", "zoen =", "unknown key input.0.columns.event_ts.zoen; did you mean zone?"),
        ("default =", "defalt =", "unknown key input.0.columns.item_id.defalt; did you mean default?"),
        ("when =", "wen =", "unknown key input.0.reject.0.wen; did you mean when?"),
        ('{ constant = "purchase" }', '{ constant = "a", expr = "b" }', "needs exactly one of column, constant, expr"),
        (
            '{ columns = ["order", "line"] }',
            "{ ordinal = true }",
            "needs exactly one of column, columns, constant, expr",
        ),
        ('user_id = "customer"', "", "input.0.columns.user_id is missing"),
        ('format = "csv"', 'format = "xlsx"', "input.0.format = 'xlsx'"),
        ('"test_order"', '"Test order"', "input.0.reject.0.reason: found 'Test order', which must consist of lower-"),
        (
            "[[input]]\n",
            "[input]\n",
            "input = { ... }: write a list of tables, such as [{ name = ... }], or each of them below [[input]]",
        ),
        ("[[input.reject]]", "[input.reject]", "or each of them below [[input.reject]] (known keys: reason, when)"),
        (
            'name = "shop"',
            'name = "1shop"',
            "name: found '1shop', which must consist of lower-case letters (a-z), digits",
        ),
        ('name = "shop"', 'name = "shop', "is not a valid TOML file"),
    ],
)
def test_a_wrong_mapping_is_one_sentence_that_says_where(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(TrailvecError) as error:
        _load(tmp_path, old, new)
    assert said in str(error.value)
    assert str(tmp_path / "shop.toml") in str(error.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("", ""), "two inputs read orders.csv, but each needs a unique name"),
        (('name = "a"', 'name = "a"'), "two inputs are named a, but each needs a unique name"),
        (('name = "a"', ""), None),
        (('name = "a"', 'name = "b"'), None),
    ],
)
def test_inputs_of_one_path_need_names(tmp_path: Path, names: tuple[str, str], said: str | None) -> None:
    path = tmp_path / "shop.toml"
    head, _, mapping = GOOD.partition("[[input]]")
    path.write_text(head + "".join(f"[[input]]\n{name}{mapping}" for name in names))
    if said is None:
        first, second = load_source(path).input
        assert first.key != second.key
    else:
        with pytest.raises(TrailvecError, match=said):
            load_source(path)


def test_a_missing_mapping_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrailvecError, match=r"nowhere\.toml does not exist"):
        load_source(tmp_path / "nowhere.toml")
