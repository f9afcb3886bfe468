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


def key_of(name: str, what: str) -> bytes:
    """The key from the environment, else from the file of keys.

    Args:
        what: what the key is for, for the message.

    Raises:
        TrailvecError: there is no such key.
    """
    key = os.environ.get(name)
    if not key and (file := os.environ.get(_FILE)):
        key = json.loads(Path(file).read_text()).get(name)
    if not key:
        raise TrailvecError(f"the environment has no {name}, the key that {what}: export {name}=...")
    return key.encode()
