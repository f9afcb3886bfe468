"""Recognises erased users, by the keyed hashes in `erased_users`.

Their key is separate from the exports' key, which may be changed (giving other pseudonyms and control groups). This one
must never change, or erased users could come back unnoticed. So each hash is stored with a mark of the key, and any
other key is refused.
"""

from __future__ import annotations

from jobs.errors import TrailvecError
from jobs.keys import key_of
from jobs.runtime import Runtime
from jobs.tables import ERASED_USERS
from spark_udfs.keyed import ColumnTest, key_mark, of_column, on_list, on_list_in_raw

ERASE_KEY = "TRAILVEC_ERASE_KEY"


def erase_key(runtime: Runtime) -> bytes:
    """The key from the environment.

    Raises:
        TrailvecError: there is none, or it differs from the key of earlier erasures.
    """
    key = key_of(ERASE_KEY, "erased users are known by")
    if runtime.exists(ERASED_USERS):
        marks = runtime.latest(ERASED_USERS).select("key_mark").distinct().collect()
        if any(row["key_mark"] != key_mark(key) for row in marks):
            raise TrailvecError(
                f"{ERASE_KEY} is not the key that users were erased with, so they could come back unnoticed: set the "
                f"old one"
            )
    return key


def erased_tests(runtime: Runtime) -> tuple[ColumnTest, ColumnTest] | None:
    """Two boolean functions of a column: is this user_id erased; does this raw record contain an erased one. None if
    nobody has been erased. The hashes are read once, on the driver.

    Raises:
        TrailvecError: as `erase_key`, if anybody has been erased.
    """
    if not runtime.exists(ERASED_USERS):
        return None
    hashes = [row["user_hash"] for row in runtime.latest(ERASED_USERS).select("user_hash").distinct().collect()]
    if not hashes:
        return None
    key = erase_key(runtime)
    return of_column(on_list(key, hashes)), of_column(on_list_in_raw(key, hashes))
