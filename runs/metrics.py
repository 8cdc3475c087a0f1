"""The metrics file of a run, `metrics.jsonl`: one JSON object per logged step, with its number as `step`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.log import log
from runs.files import free_name, write_whole

METRICS_FILE = "metrics.jsonl"
_END_OF_TRAINING = "train_runtime"
"""In the line that ends the training of a process; a resumed run has one of its own."""


def append_metrics(file: Path, step: int, figures: Mapping[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": step, **figures}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    return [line for line in map(_parsed, _lines(file)) if line is not None]


def is_evaluated(file: Path, step: int) -> bool:
    lines = read_metrics(file) if file.exists() else []
    return any(line["step"] == step and any(key.startswith("eval_") for key in line) for line in lines)


def drop_metrics_after(file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run repeats.

    A last line that was cut off goes with them; a file with lines of anything else is kept beside the repaired one.
    """
    if not file.exists():
        return
    texts = _lines(file)
    parsed = [_parsed(text) for text in texts]
    if parsed and parsed[-1] is None and not file.read_bytes().endswith(b"\n"):
        log.warning("%s: its last line was cut off and is left out", file)
        parsed.pop()
    if num_damaged := parsed.count(None):
        kept = free_name(file.with_name(f"{file.name}.damaged"))
        shutil.copy2(file, kept)
        log.warning("%s: %d lines cannot be read and are left out; it is kept as %s", file, num_damaged, kept)
    with_step = [(text, line) for text, line in zip(texts, parsed, strict=False) if line is not None]
    again = [text for text, line in with_step if step and line["step"] <= step and _END_OF_TRAINING not in line]
    write_whole(file, "".join(f"{text}\n" for text in again))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(text: str) -> dict[str, Any] | None:
    """A line as it was logged; None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
