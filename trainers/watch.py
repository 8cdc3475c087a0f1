"""Watch a run from another terminal, one line: `python -m trainers.watch [results/NAME] [--once]`.

The GPU's memory as its driver reports it, the step, and the peak of each phase beside the plan's. Without a folder the
run of results/ that was written to last. Ends with the run. Exit status: 0, or 2 where there is no such run.
"""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.live import Live
from rich.text import Text

from core.errors import UserError
from core.gpu import find_gpu
from core.log import console
from core.types import Phase
from core.units import gb
from runs.metrics import METRICS_FILE, read_metrics
from runs.run_folder import CONFIG_FILE, LOCK_FILE, SUMMARY_FILE

_EVERY_S = 2.0


def newest_run(folder: Path) -> Path:
    """The run that `folder` is, or the one below it that was written to last.

    Raises:
        UserError: no run lies there.
    """
    runs = [folder] if (folder / CONFIG_FILE).is_file() else [file.parent for file in folder.rglob(CONFIG_FILE)]
    if not runs:
        raise UserError(
            f"no run in {folder.absolute()}",
            expected="the folder of a run, e.g. results/teacher_rlt_tiny",
            remedy="python -m trainers.watch FOLDER",
        )
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.iterdir()))


def running_process(run: Path) -> psutil.Process | None:
    """The process that trains in the folder; None where the run has ended."""
    if (run / SUMMARY_FILE).exists():
        return None
    lock = run / LOCK_FILE
    try:
        process = psutil.Process(int(lock.read_text(encoding="utf-8")))
        is_older = process.create_time() <= lock.stat().st_mtime  # a later process may have got the number
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return process if is_older else None


def line(run: Path) -> str:
    """Time, memory in use, state and step of the run, peaks of its phases."""
    process, gpu = running_process(run), find_gpu()
    if gpu is not None:
        memory = f"{gpu.name}: {gb(gpu.used_bytes):.1f} of {gb(gpu.total_bytes):.1f} GB in use"
    else:
        memory = "no GPU"
        if process is not None:
            memory += f": process {process.pid} holds {gb(process.memory_info().rss):.1f} GB of RAM"
    state = "running" if process is not None else "finished" if (run / SUMMARY_FILE).exists() else "stopped"
    parts = [f"{datetime.now():%H:%M:%S}", memory, f"{run.name} {state}, {_progress(run)}"]
    if peaks := _peaks(run):
        parts.append(f"peaks/planned GB: {peaks}")
    return "  ".join(parts)


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / METRICS_FILE
    return read_metrics(file) if file.exists() else []


def _progress(run: Path) -> str:
    max_steps = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8")).get("max_steps") or 0
    logged = [metrics for metrics in _metrics(run) if "loss" in metrics]
    step = f"step {logged[-1]['step'] if logged else 0}" + (f"/{max_steps}" if max_steps > 0 else "")
    reward = logged[-1].get("reward") if logged else None
    return step if reward is None else f"{step}, reward {reward:.2f}"


def _peaks(run: Path) -> str:
    """`train 37.2/37.7`: measured (on a CPU the resident set) and predicted for a GPU."""
    for metrics in reversed(_metrics(run)):
        shown = []
        for phase in Phase:
            measured = [metrics.get(f"memory/{phase}_{kind}_gb") for kind in ("driver", "reserved", "rss")]
            if peak := next((value for value in measured if value), None):
                shown.append(f"{phase} {peak:.1f}/{metrics[f'memory/{phase}_predicted_gb']:.1f}")
        if shown:
            return " ".join(shown)
    return ""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("results"), metavar="RUN", help="a run, or a folder of runs"
    )
    parser.add_argument("--once", action="store_true", help="print the line once")
    arguments = parser.parse_args(words)
    try:
        run = newest_run(arguments.run)
    except UserError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    if arguments.once or running_process(run) is None:
        console.print(line(run), highlight=False, soft_wrap=True)
        return 0
    try:
        with Live(Text(line(run)), console=console, auto_refresh=False) as live:
            while running_process(run) is not None:
                time.sleep(_EVERY_S)
                live.update(Text(line(run)), refresh=True)
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
