"""Ids under a key, and ids inside raw records."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import TrailvecError
from jobs.keys import key_of
from jobs.segment_files import KEY as EXPORT_KEY
from jobs.segment_files import export_key
from jobs.tombstones import ERASE_KEY, _key_of_marks
from spark_udfs.keyed import TextTest, hashed, key_mark, mentions, on_list, on_list_in_raw, values

KEY = b"a key"


def asked(test: TextTest, texts: list[str]) -> list[bool]:
    return [test(text) for text in texts]


def test_hashes_are_hmac_sha256() -> None:
    for key in (KEY, b"k" * 64, b"longer than SHA-256's block of 64 bytes " * 2):
        assert hashed(key, ["ann", "é", ""]) == [
            hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for text in ("ann", "é", "")
        ]


def test_a_key_is_the_environments_or_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAILVEC_A", "TRAILVEC_KEYS"):
        monkeypatch.delenv(name, raising=False)
    refused = re.escape("the environment has no TRAILVEC_A, the key that opens: export TRAILVEC_A=...")
    with pytest.raises(TrailvecError, match=refused):
        key_of("TRAILVEC_A", "opens")
    monkeypatch.setenv("TRAILVEC_KEYS", str(tmp_path / "keys.json"))
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(TrailvecError, match=refused):
        key_of("TRAILVEC_A", "opens")
    (tmp_path / "keys.json").write_text(json.dumps({"TRAILVEC_A": "é $$"}))
    assert key_of("TRAILVEC_A", "opens") == "é $$".encode()
    monkeypatch.setenv("TRAILVEC_A", "mine")
    assert key_of("TRAILVEC_A", "opens") == b"mine"


def test_a_key_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not an erasures' key in use: it can't be changed."""
    for name in (EXPORT_KEY, ERASE_KEY):
        monkeypatch.setenv(name, "x" * 15)
    with pytest.raises(TrailvecError, match="TRAILVEC_EXPORT_KEY has 15 bytes, so few that it could be guessed"):
        export_key()
    with pytest.raises(TrailvecError, match="TRAILVEC_ERASE_KEY has 15 bytes, so few that it could be guessed"):
        _key_of_marks(set())
    assert _key_of_marks({key_mark(b"x" * 15)}) == b"x" * 15
    for name in (EXPORT_KEY, ERASE_KEY):
        monkeypatch.setenv(name, "x" * 16)
    assert export_key() == _key_of_marks(set()) == b"x" * 16


def test_who_is_on_a_list_of_hashes() -> None:
    listed = hashed(KEY, ["ann", ""])
    assert asked(on_list(KEY, listed), ["ann", "Ann", "bob"]) == [True, False, False]
    assert asked(on_list(b"another", listed), ["ann"]) == [False]


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("1,ann,2023-05-01", "ann"),
        ("1;'ann';x", "ann"),
        ('1,"o""neil, a",x', 'o"neil, a'),
        ('{"user": {"id": 12}, "x": ["b c", null]}', "12"),
        ('{"user": {"id": 12}, "x": ["b c", null]}', "b c"),
        ('{"user": "ann", "broken', "ann"),
        ("1;ann lee;x", "ann lee"),
        ("1\tann lee\tx", "ann lee"),
        ("1|ann lee|x", "ann lee"),
        ('1,"oat milk,ann lee,2023', "ann lee"),  # what opens a field or an object, and is never closed
        ('{"user":"ann lee","x":', "ann lee"),
        ("1,ann lee,a\rb", "ann lee"),
        ("id=ann&x", "ann&x"),
        ('{"user":17850.0}', "17850"),  # pandas, beside a missing one
        ('{"user":1.785E7}', "17850000"),  # the same, as Spark writes it
        ('{"user":17850.0000000000}', "17850"),
        (r'{"user":"a\/b","broken', "a/b"),  # PHP
        (r'{"user":"x\u003d1","broken', "x=1"),  # Gson
        (r'{"user":"o\u0027neil","broken', "o'neil"),
        (r'{"user":"jos\u00E9\uD83D\uDE00","broken', "josé😀"),
        (r'{"text":"{\"user\":\"ann\"}"}', "ann"),
        ('{"user": 17850.0, "item": "x", "broken', "17850"),
        (r'{"payload": "{\"user_id\": 17850.0}"}', "17850"),
        ('[{"user":1.785E7', "17850000"),
        (r'"{\"user_id\": 17850.0}"', "17850"),  # JSON encoded twice, as in many Kafka topics
        ('2024,12.00,"{""user_id"": 17850.0}"', "17850"),
        ('\ufeff{"user_id": 17850.0, "x', "17850"),
        ('data: {"user_id": 17850.0}', "17850"),
        ('{"user_id": 1.785e4}', "17850"),
        ('{"user_id": 1e+16, "x', "10000000000000000"),  # Python
        ("1;ann lee\0\0;x", "ann lee"),  # C
        (r'{"user":"ann\u0000","broken', "ann"),
        ("1\x01ann lee\x012023", "ann lee"),  # Hive
        ('1^"ann lee"^x', "ann lee"),
        ("1~|~ann~|~x", "ann"),
        ("1,ann\u00a0,x,extra", "ann\u00a0"),  # a no-break space
        ("1; \u3000ann ;x", "\u3000ann"),
        ('{"user":"ann\u2003","broken', "ann\u2003"),
    ],
)
def test_values_of_a_record_that_could_not_be_read(raw: str, value: str) -> None:
    assert value in values(raw)
    assert asked(mentions([value]), [raw]) == [True]  # erase_users looks by this, ingest by the other
    assert asked(on_list_in_raw(KEY, hashed(KEY, [value])), [raw, "else"]) == [True, False]


@given(
    user=st.integers(0, 10**17),
    other=st.integers(100, 10**17),  # shorter ones erasure also finds inside a number: 0 in 1.0, 16 in 1e+16
    written=st.sampled_from([str, float, "{:e}".format, "{:.16E}".format, "{}.0".format, '"{}"'.format]),
    around=st.sampled_from(["{}", "\ufeff{}", "data: {}", "[{}", '{{"x": [1, {}', "{},x"]),
    encode=st.sampled_from([str, json.dumps, lambda text: '7,"{}"'.format(text.replace('"', '""'))]),
)
def test_what_erasure_finds_in_json_and_what_ingest_finds_are_the_same(
    user: int, other: int, written: Callable[[int], object], around: str, encode: Callable[[str], str]
) -> None:
    value = str(written(user))
    user = int(Decimal(value.strip('"')))  # {:e} rounds
    raw = encode(around.format(f'{{"user_id": {value}}}'))
    assert str(user) in values(raw)
    for id_ in {str(user), str(other)}:
        assert (id_ in values(raw)) == mentions([id_])(raw)


def test_a_price_is_nobody() -> None:
    assert values('9,"oat milk,ann,5.00') >= {"9", "oat milk", "ann", "5.00"}
    assert not asked(on_list_in_raw(KEY, hashed(KEY, ["5"])), ['9,"oat milk,ann,5.00'])[0]
    assert "12" not in values('17850,12.00,"{""user_id"": 17850.0}"')


def test_half_of_an_emoji_in_json_stops_nothing() -> None:
    raws = [json.dumps({"user": user, "name": "cut \ud83d"}) for user in ("ann", "bob")]
    assert asked(on_list_in_raw(KEY, hashed(KEY, ["ann"])), raws) == [True, False]


@pytest.mark.parametrize(
    ("user", "raw", "found"),
    [
        ("12", '{"user":12}', True),
        ("12", "a,12.50,b", True),  # rather one too many
        ("17850000", '{"user":1.785E7}', True),
        ("17850000", '{"user":1.785E70}', False),
        ("17850000", "2023-05-01-1.785E7-mobile", True),
        ("45000", "550e8400-45e3-41d4-a716-446655440000,x", False),  # a group of a UUID
        ("12", "a,112,b", False),
        ("12", "a,12b,b", False),
        ("user-7", "x,user-7,y", True),
        ("user-7", "x,user-77,y", False),
        ("7-user", "x,17-user,y", False),
        ('o"neil', '1,"o""neil",x', True),
        ('o"neil', json.dumps({"user": 'o"neil'}), True),
        ("José", json.dumps({"user": "José"}), True),
        ("José", "1,José,x", True),
        ("José😀", r'{"user":"Jos\u00E9\uD83D\uDE00"}', True),
        ("a/b", r'{"user":"a\/b"}', True),
        ("x=1", r'{"user":"x\u003d1"}', True),
        ("o'neil", r'{"user":"o\u0027neil"}', True),
        ('é="', r'{"user":"\u00E9\u003d\""}', True),
        ("ann", r'{"text":"one\nann"}', True),
        ("a/b", r'{"user":"a\\/b"}', False),  # a\/b
        ("-ann-", "a-ann-b", True),
        ("***", "a,***,b", True),
        ("a b", "x,a  b", False),
    ],
)
def test_ids_in_a_text(user: str, raw: str, found: bool) -> None:
    others = [f"user-{number}x" for number in range(100)]  # words that many ids share
    assert asked(mentions([user, *others]), [raw]) == [found]
