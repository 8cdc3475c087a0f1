"""Atomic file writes: a reader sees the old content or the new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` when the block ends without an error.

    A power failure leaves the old content or the new one; where it is not `synced`, which is faster, perhaps neither.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if synced:
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{i}") for i in range(1, 10**6))
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))
