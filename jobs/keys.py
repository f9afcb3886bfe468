"""The keys for hashing ids, each named by its environment variable.

On YARN a variable would appear in the container's launch script, which nodes keep with the logs. So
scripts/submit_yarn.sh ships a file of keys and puts its path into TRAILVEC_KEYS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from jobs.errors import TrailvecError

_FILE = "TRAILVEC_KEYS"
_SHORTEST = 16  # bytes


def key_of(name: str, what: str) -> bytes:
    """The key from the environment, else from the file of keys.

    Args:
        what: what the key is for, for the message.

    Raises:
        TrailvecError: there is no such key.
    """
    key = os.environ.get(name)
    if not key and (file := os.environ.get(_FILE)):
        key = json.loads(Path(file).read_text("utf-8")).get(name)
    if not key:
        raise TrailvecError(f"the environment has no {name}, the key that {what}: export {name}=...")
    return key.encode()


def long_enough(name: str, key: bytes) -> bytes:
    """The same key.

    Raises:
        TrailvecError: it is so short that who has one id and its hash can find it by trying, and with it all ids.
    """
    if len(key) < _SHORTEST:
        raise TrailvecError(
            f"{name} has {len(key)} bytes, so few that it could be guessed from a hash: make one of at least "
            f"{_SHORTEST}, with `python -c 'import secrets; print(secrets.token_hex(32))'`, and keep it"
        )
    return key
