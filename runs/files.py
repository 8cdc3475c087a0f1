"""Atomic file writes: a reader sees the old content or the new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    with replaced_file(path) as partial:
        partial.write_text(text)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    os.replace(partial, path)
