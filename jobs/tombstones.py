"""Recognises erased users, by the keyed hashes in `erased_users`.

Their key is separate from the exports' key, which may be changed (giving other pseudonyms and control groups). This one
must never change, or erased users could come back unnoticed. So each hash is stored with a mark of the key, and any
other key is refused.
"""

from __future__ import annotations

from jobs.errors import TrailvecError
from jobs.keys import key_of, long_enough
from jobs.runtime import Runtime
from jobs.tables import ERASED_USERS
from spark_udfs.keyed import ColumnTest, key_mark, of_column, on_list, on_list_in_raw

ERASE_KEY = "TRAILVEC_ERASE_KEY"


def erase_key(runtime: Runtime) -> bytes:
    """The key from the environment.

    Raises:
        TrailvecError: there is none, or it differs from the key of earlier erasures, or is too short for a first one.
    """
    marks = runtime.latest(ERASED_USERS).select("key_mark").distinct().collect() if runtime.exists(ERASED_USERS) else ()
    return _key_of_marks({row["key_mark"] for row in marks})


def _key_of_marks(marks: set[str]) -> bytes:
    key = key_of(ERASE_KEY, "erased users are known by")
    if marks - {key_mark(key)}:
        raise TrailvecError(
            f"{ERASE_KEY} is not the key that users were erased with, so they could come back unnoticed: set the old "
            f"one"
        )
    return key if marks else long_enough(ERASE_KEY, key)  # one in use can't be changed any more


def erased_tests(runtime: Runtime) -> tuple[ColumnTest, ColumnTest] | None:
    """Two boolean functions of a column: is this user_id erased; does this raw record contain an erased one. None if
    nobody has been erased. The hashes are read once, on the driver.

    Raises:
        TrailvecError: as `erase_key`, if anybody has been erased.
    """
    if not runtime.exists(ERASED_USERS):
        return None
    erased = runtime.latest(ERASED_USERS).select("user_hash", "key_mark").distinct().collect()
    if not erased:
        return None
    key, hashes = _key_of_marks({row["key_mark"] for row in erased}), [row["user_hash"] for row in erased]
    return of_column(on_list(key, hashes)), of_column(on_list_in_raw(key, hashes))
