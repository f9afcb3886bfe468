"""Keyed hashes (HMAC-SHA256) of user ids, tests against a list of such hashes, and the search for ids in raw records.

The keys and ids reach the workers pickled inside the functions, so that no plan or log shows them. Above 1 MiB (from
some 30,000 erased users on) PySpark passes such a function on in a file of Spark's temporary folder, which a kill may
leave.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from pyspark.sql import Column
from pyspark.sql.pandas.functions import pandas_udf

from spark_udfs.vectors import Series

TextTest = Callable[[str], bool]
ColumnTest = Callable[[Column], Column]

_WORD = re.compile(r"\w+")
_STRUCTURE = re.compile(r"[\s\0\"'{}\[\](),;:|=]+")  # NULs pad the fields of fixed-width exports
_FIELDS = re.compile(r"[\t\r\n\0\"'{}\[\](),;:|=&]+")  # splits at no space: an id may contain spaces
# Delimiters that no value is likely to hold, as Hive's \x01; a full stop, a hyphen and the like stand within values.
_RARE_DELIMITERS = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f^~\u00a4\u00a6\u00a7\u00ac]")
# Not within a word. Without a point not within a UUID either, whose groups may look like 45e3.
_REAL = re.compile(r"(?<!\w)\d{1,40}\.\d{1,40}(?:[eE]\+?\d{1,2})?(?!\w)|(?<!\w)(?<!\w-)\d{1,40}[eE]\+?\d{1,2}(?!-?\w)")
_ESCAPES = re.compile(r'(?:\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))+')


def hashed(key: bytes, texts: Iterable[str]) -> list[str]:
    """HMAC-SHA256 of each text, in hexadecimal digits."""
    return [digest.hex() for digest in digests(key, texts)]


def digests(key: bytes, texts: Iterable[str]) -> Iterator[bytes]:
    """HMAC-SHA256 of each text (RFC 2104). Python's `hmac` takes twice as long, as it copies and digests in Python."""
    block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))
    for text in texts:
        of_text, mac = inner.copy(), outer.copy()
        of_text.update(text.encode("utf-8", "surrogatepass"))  # JSON may hold a lone surrogate: "cut \ud83d"
        mac.update(of_text.digest())
        yield mac.digest()


def key_mark(key: bytes) -> str:
    """A fingerprint of the key: tells keys apart without revealing them."""
    return hashed(key, ["which key is this?"])[0]


def of_column(test: TextTest) -> ColumnTest:
    """The test of a text as a function of a string column, to boolean; false for NULL."""

    def each(texts: Series) -> Series:
        return texts.map(lambda text: text is not None and test(text))

    return pandas_udf(each, "boolean")  # type: ignore[call-overload,no-any-return]


def on_list(key: bytes, hashes: Sequence[str]) -> TextTest:
    """Is the hash of a user_id one of `hashes` (made by `hashed`)? Each worker holds them all, some 90 bytes each."""
    listed = frozenset(map(bytes.fromhex, hashes))
    return lambda user_id: hmac.digest(key, user_id.encode(), "sha256") in listed


def on_list_in_raw(key: bytes, hashes: Sequence[str]) -> TextTest:
    """Is the hash of one of a raw record's `values` one of `hashes`?"""
    listed = frozenset(map(bytes.fromhex, hashes))
    return lambda raw: not listed.isdisjoint(digests(key, values(raw)))


def values(raw: str) -> set[str]:
    """Everything that may be a value of a record that could not be parsed: JSON values, CSV fields by several
    delimiters, and the pieces between quotes, brackets, commas and the like, also split at spaces. As written and with
    JSON escapes decoded; whole JSON floats (17850.0) also as integers."""
    pieces, plain = _pieces(raw), _unescaped(raw)
    if plain != raw:
        pieces.update([_unescaped(piece) for piece in pieces], _pieces(plain))
    start = min((at for opening in "{[" if (at := plain.find(opening)) >= 0), default=None)
    if start is not None:  # JSON: truncated, in a string, in a CSV field or after a label; not CSV prices before it
        pieces.update(_pieces(_whole(plain[start:])))
    with suppress(ValueError, RecursionError):
        pieces.update(_leaves(json.loads(raw)))
    return pieces


def _pieces(text: str) -> set[str]:
    fields = _FIELDS.split(text)
    for delimiter in {*",;\t|", *_RARE_DELIMITERS.findall(text)}:
        with suppress(csv.Error):
            fields += next(csv.reader([text], delimiter=delimiter), [])
    # An id is stripped of ASCII's blanks alone: a no-break space at its end is part of it, or was not meant.
    stripped = (field.strip(string.whitespace) for field in fields)
    return {*_STRUCTURE.split(text), *map(str.strip, fields), *stripped} - {""}


def _unescaped(text: str) -> str:
    """The text with JSON escapes decoded: writers differ in which characters they escape (PHP /, Gson = and '), and in
    the case of their hex digits."""
    return _ESCAPES.sub(lambda match: str(json.loads(f'"{match[0]}"')), text)


def _whole(text: str) -> str:
    """The text with 17850.0 rewritten as 17850 (pandas turns integers into floats beside a missing value), and Spark's
    1.785E7 or Python's 1e+16 in full."""

    def digits(match: re.Match[str]) -> str:
        number = Decimal(match[0])
        return str(int(number)) if number == int(number) else match[0]

    return _REAL.sub(digits, text)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for element in value:
            yield from _leaves(element)
    elif value is not None:
        yield str(value)
        if isinstance(value, float) and value.is_integer():  # see `_whole`
            yield str(int(value))


def mentions(ids: Sequence[str]) -> TextTest:
    """Does a text contain one of the ids, as it is or escaped by JSON or CSV, and not inside a longer word or number?
    Errs towards false positives: the id 12 is found in 12.50, too."""
    forms_by_word, without_words = _by_rarest_word(ids)

    def holds(raw: str) -> bool:
        plain = _unescaped(raw)
        return any(map(is_in, {raw, plain, _whole(plain)}))

    def is_in(text: str) -> bool:
        for word in _WORD.finditer(text):
            for offset, form in forms_by_word.get(word[0], ()):
                start = word.start() - offset
                if start >= 0 and text.startswith(form, start) and _stands_alone(text, start, start + len(form)):
                    return True
        return any(form in text for form in without_words)

    return holds


def _by_rarest_word(ids: Sequence[str]) -> tuple[dict[str, list[tuple[int, str]]], list[str]]:
    """The ids' written forms, indexed by each form's rarest word (with its offset), and the forms without a word: a
    text is then scanned word by word once, however many ids there are."""
    forms = {form for text in ids for form in (text, json.dumps(text)[1:-1], text.replace('"', '""'))}
    shared = Counter(word[0] for form in forms for word in _WORD.finditer(form))
    by_word: dict[str, list[tuple[int, str]]] = defaultdict(list)
    without: list[str] = []
    for form in forms:
        words = list(_WORD.finditer(form))
        if words:
            rarest = min(words, key=lambda word: (shared[word[0]], word.start()))
            by_word[rarest[0]].append((rarest.start(), form))
        else:
            without.append(form)
    return dict(by_word), without


def _stands_alone(text: str, start: int, end: int) -> bool:
    def is_word(place: int) -> bool:
        return 0 <= place < len(text) and _WORD.match(text[place]) is not None

    return not (is_word(start - 1) and is_word(start)) and not (is_word(end - 1) and is_word(end))
