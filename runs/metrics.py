"""The metrics file of a run, `metrics.jsonl`: one JSON object per logged step, with its number as `step`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs.files import write_whole

METRICS_FILE = "metrics.jsonl"


def append_metrics(file: Path, step: int, figures: Mapping[str, Any]) -> None:
    with open(file, "a") as handle:
        handle.write(json.dumps({"step": step, **figures}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def drop_metrics_after(file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run repeats, and a last line that was cut off."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if step and json.loads(line)["step"] <= step]
        write_whole(file, "".join(f"{line}\n" for line in kept))
