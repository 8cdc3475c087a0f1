"""CPU seconds from the command to the end of the first optimizer step of the embedded run, by part.

    python -m benchmarks.startup [--before CHECKOUT] [--repeats 5] [SETTING=VALUE ...]

Each run is a process of its own; the embedded model is made beforehand. Counted are user and system seconds of the
process and of the children that it waited for. `--before` is another checkout of this project (`git worktree add`),
whose runs take turns with those of this one; the least of the repeats counts. A part's seconds include the imports that
it causes; the second table has them by package, of one more run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from core.log import console
from data.embedded.model import ensure_tiny_model

_HERE = Path(__file__).resolve().parent.parent
_NUM_PACKAGES_SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    words = parser.parse_args()
    ensure_tiny_model()
    sides = {"here": _HERE} | ({"before": words.before.resolve()} if words.before else {})
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(words.repeats):
        for side, checkout in sides.items():
            runs[side].append(one_run(checkout, "parts", words.settings))
    least = {side: min(of_side, key=lambda run: sum(run.values())) for side, of_side in runs.items()}
    show("CPU s to the end of the first step", least)
    if words.before:
        seconds = {side: sum(run.values()) for side, run in least.items()}
        console.print(f"before / here: {seconds['before'] / seconds['here']:.2f}")
    show("CPU s in modules of a package", {s: one_run(path, "imports", words.settings) for s, path in sides.items()})


def one_run(checkout: Path, kind: str, settings: list[str]) -> dict[str, float]:
    """Seconds by part of one run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "seconds.json")
        script = str(_HERE / "benchmarks" / "startup_parts.py")
        run = ["--config-name=teacher_rlt_tiny", f"output_dir={folder}/run", "max_steps=1", *settings]
        done = subprocess.run(
            [sys.executable, script, str(file), kind, *run],
            cwd=checkout,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0 or not file.exists():
            sys.exit(f"the run in {checkout} failed:\n{done.stdout}")
        return json.loads(file.read_text())


def show(title: str, sides: dict[str, dict[str, float]]) -> None:
    table = Table("", *sides, title=title)
    parts = dict.fromkeys(part for run in sides.values() for part in run)
    shown = sorted(parts, key=lambda part: -max(run.get(part, 0.0) for run in sides.values()))[:_NUM_PACKAGES_SHOWN]
    for part in (part for part in parts if part in shown):
        table.add_row(part, *(f"{run.get(part, 0.0):.2f}" for run in sides.values()))
    table.add_row("all", *(f"{sum(run.values()):.2f}" for run in sides.values()), style="bold")
    console.print(table)


if __name__ == "__main__":
    main()
