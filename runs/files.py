"""Files that a reader sees whole: the old content or the new one, never a part."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
