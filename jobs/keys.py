"""The keys that ids are hashed with, each by the name of its environment variable.

On YARN a variable would stand in the script that starts the container, which nodes keep among the logs:
scripts/submit_yarn.sh sends a file, and tells in TRAILVEC_KEYS where it lies there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from jobs.errors import TrailvecError

_FILE = "TRAILVEC_KEYS"


def key_of(name: str, what: str) -> bytes:
    """The environment's key, else that of the file of keys.

    Raises:
        TrailvecError: there is none; `what` says what it is for.
    """
    key = os.environ.get(name)
    if not key and (file := os.environ.get(_FILE)):
        key = json.loads(Path(file).read_text()).get(name)
    if not key:
        raise TrailvecError(f"the environment has no {name}, the key that {what}: export {name}=...")
    return key.encode()
