"""Toy jobs for the runner of pipelines: a process that looks like `train.py` from outside, without torch.

It notes in `order.txt` of the current folder when it starts and ends, takes `max_steps` tenths of a second, copies what
its input job left, and ends as `behaviour.json` says for its stage.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.process import end_with_parent

COMMAND = (sys.executable, "-m", "tests.helpers.toy_pipeline")
BEHAVIOUR, ORDER, INTERRUPTED = Path("behaviour.json"), Path("order.txt"), Path("interrupted.txt")


def toy_pipeline(**settings: Any) -> dict[str, Any]:
    """Composed values: two stages of which the second has arms and reads the first, and a third that reads all arms."""
    first = {"config": "teacher_rlt_tiny", "settings": {"seed": "{seed}", "max_steps": 1}}
    second = {
        "config": "teacher_rlt_tiny",
        "settings": {"model_args": {"adapter_path": "{folder:first}"}, "max_steps": 1},
        "arms": {"a": None, "b": {"learning_rate": 0.001}},
    }
    third = {"config": "evaluate_tiny", "settings": {"models": ["tiny", "{folders:second}"]}}
    return {
        "method": "pipeline",
        "run_name": "toy",
        "output_dir": "results/toy",
        "seeds": [0, 1],
        "jobs_at_once": 2,
        "stages": {"first": first, "second": second, "third": third},
    } | settings


def note(file: Path, text: str) -> None:
    with open(file, "a") as handle:
        handle.write(f"{text}\n")


def started() -> list[str]:
    lines = ORDER.read_text().splitlines() if ORDER.exists() else []
    return [line.removeprefix("start ") for line in lines if line.startswith("start ")]


def _settings(words: list[str]) -> Mapping[str, str]:
    return {key: value.strip("'") for key, _, value in (word.partition("=") for word in words)}


def main(words: list[str]) -> int:
    end_with_parent()
    signal.signal(signal.SIGTERM, _interrupted)
    settings = _settings(words)
    folder = Path(settings["output_dir"])
    name = str(folder.relative_to("results/toy"))
    behaviour = json.loads(BEHAVIOUR.read_text()) if BEHAVIOUR.exists() else {}
    found = behaviour.get(name.split("/")[0], 0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("method: toy\n")
    note(ORDER, f"start {name} {os.getpid()}")
    sys.stdout.write(f"this is the job {name}\n")
    time.sleep(float(settings.get("max_steps", 1)) / 10)
    if found:
        sys.stdout.write("it cannot work because of the weather\n")
        return int(found)
    inputs = re.findall(r"results/toy/[\w/]+", " ".join(words[1:]).replace(settings["output_dir"], ""))
    for path in inputs:
        assert (Path(path) / "summary.json").is_file(), f"{path} was not finished before {name}"
    if name.startswith("third"):
        _write_samples(folder, inputs)
    (folder / "summary.json").write_text(json.dumps({"inputs": inputs, "pid": os.getpid()}))
    note(ORDER, f"end {name}")
    return 0


def _write_samples(folder: Path, models: list[str]) -> None:
    """Answers to two questions, one sampled right of two; those of arm b are all right."""
    import pandas as pd

    rows = [
        {"model": model, "question_number": question, "decoding": decoding, "right": sample == 0 or "/b/" in model}
        for model in ["tiny", *models]
        for question in (0, 1)
        for decoding, num_samples in (("sampled", 2), ("greedy", 1))
        for sample in range(num_samples)
    ]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet")


def _interrupted(*_: Any) -> None:
    note(INTERRUPTED, str(os.getpid()))
    sys.exit(130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
