"""Locks that say whether a folder belongs to a living process: unlike process ids, across PID namespaces too."""

import fcntl
from pathlib import Path
from typing import IO


def try_lock(file: Path, mode: str = "a") -> IO[str] | None:
    """The lock on a file, held while the handle is open; None where another process holds it.

    Raises:
        OSError: the file cannot be opened that way.
    """
    handle = open(file, mode)  # noqa: SIM115 - the caller holds it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def is_held(file: Path) -> bool:
    """Whether a living process holds the lock on a file; also where this one may not look. No file: nobody does."""
    try:
        handle = try_lock(file, "r+")
    except FileNotFoundError:
        return False
    except OSError:
        return True
    if handle is None:
        return True
    handle.close()
    return False
