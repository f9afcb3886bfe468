"""Progress reporting for long stages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def meanwhile(act: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `act` every `seconds` in a background thread until the block ends."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            act()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
