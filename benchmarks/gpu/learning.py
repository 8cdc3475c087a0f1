"""Part g: the embedded run on the GPU. Real weights, small: it has to learn as it does on a CPU."""

import json
import subprocess
import sys

from benchmarks.gpu.cell import Setup
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.runner import Figures
from tests.test_tiny_run import assert_learned


def embedded_run(setup: Setup, figures: Figures) -> None:
    """Fifty steps and the bars of tests/test_tiny_run.py; with the tiny shape two steps and no bars."""
    num_steps = 2 if setup.is_tiny else 50
    folder = setup.scratch / "embedded"
    words = [f"max_steps={num_steps}", f"eval_steps={num_steps}", f"output_dir={folder}", "resume=never"]
    command = [sys.executable, str(ROOT / "train.py"), "--config-name=teacher_rlt_tiny", *words]
    subprocess.run(command, cwd=ROOT, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    figures.update(summary=summary, num_steps=num_steps)
    figures.add_table(
        f"embedded run, {num_steps} steps" + ("" if num_steps == 50 else ": no bar is asked of so few"),
        ("figure", "before", "after"),
        [
            [name, f"{value['before']:.3f}", f"{value['after']:.3f}"]
            for name, value in summary.items()
            if isinstance(value, dict) and "before" in value
        ],
    )
    if num_steps == 50:
        assert_learned(summary)
