"""Who was erased: the keyed hashes in `erased_users`, and the key that they are made with.

The key is of its own, not the exports': that one may be changed (other pseudonyms, other control groups), this one must
never be, or the erased could come back unseen. So each hash has the key's mark beside it, and another key is refused.
"""

from __future__ import annotations

from jobs.errors import TrailvecError
from jobs.keys import key_of
from jobs.runtime import Runtime
from jobs.tables import ERASED_USERS
from spark_udfs.keyed import ColumnTest, key_mark, of_column, on_list, on_list_in_raw

ERASE_KEY = "TRAILVEC_ERASE_KEY"


def erase_key(runtime: Runtime) -> bytes:
    """The environment's key.

    Raises:
        TrailvecError: there is none, or another than users were erased with before.
    """
    key = key_of(ERASE_KEY, "erased users are known by")
    if runtime.exists(ERASED_USERS):
        marks = runtime.latest(ERASED_USERS).select("key_mark").distinct().collect()
        if any(row["key_mark"] != key_mark(key) for row in marks):
            raise TrailvecError(
                f"{ERASE_KEY} is another key than the one that users were erased with, who could come back unseen: "
                f"set the old one"
            )
    return key


def erased_tests(runtime: Runtime) -> tuple[ColumnTest, ColumnTest] | None:
    """Two functions of a column to boolean: is this user_id erased, does this raw record hold an erased one; None where
    nobody was erased. Read once, on the driver.

    Raises:
        TrailvecError: as `erase_key`, where somebody was.
    """
    if not runtime.exists(ERASED_USERS):
        return None
    hashes = [row["user_hash"] for row in runtime.latest(ERASED_USERS).select("user_hash").distinct().collect()]
    if not hashes:
        return None
    key = erase_key(runtime)
    return of_column(on_list(key, hashes)), of_column(on_list_in_raw(key, hashes))
