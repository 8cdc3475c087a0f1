"""Measure a GPU: `make gpu`, or `python -m benchmarks.gpu [--part a] [--shape 7B]`.

Parts a to g (`--list` names them), each within --limit-s, their cells in fresh processes. The same call goes on where
the last one stopped: a cell with a result of this GPU, these versions and these sources is not run again. Results are
JSON in --out; on a GPU (shape 7B) they also go into docs/measurements.json, from which docs/measurements.md and the
README's table are written. Without a GPU what needs CUDA is skipped with the reason, and the docs stay as they are:

    python -m benchmarks.gpu --shape tiny          everything end to end on a CPU, minutes

Exit status: 0 all is measured or skipped, 1 something failed or is left for another call, 2 wrong call.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.gpu.machine import ROOT, Machine, this_machine
from benchmarks.gpu.parts import PARTS, cells_of
from benchmarks.gpu.report import PUBLISHED_SHAPE, publish
from benchmarks.gpu.runner import Result, run_cells
from core.log import configure_logging, console, log
from planner.shapes import model_sizes

SHAPES = ("tiny", *(size for size in model_sizes("Qwen2.5") if size != "72B"))
"""A 72B takes 145 GB in 16 bits, more than the GPUs have that these parts are for."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    configure_logging()
    if arguments.list:
        for part in PARTS.values():
            console.print(f"{part.letter}  {part.question}", highlight=False)
        return 0
    machine = this_machine()
    console.print(f"{machine.name}, driver {machine.driver or 'none'}, " + _versions(machine), highlight=False)
    is_whole = True
    out = arguments.out.resolve()
    for letter in arguments.part or list(PARTS):
        console.rule(f"{letter}: {PARTS[letter].question}", style="dim")
        cells = cells_of(letter, arguments.shape)
        results = list(
            run_cells(cells, machine, shape=arguments.shape, out=out, limit_s=arguments.limit_s, again=arguments.again)
        )
        for result in results:
            _show(result, out)
        if any(result.status in ("failed", "out of time") for result in results):
            log.error("part %s; look at: %s", letter, PARTS[letter].if_it_fails)
            is_whole = False
        if len(results) < len(cells):
            log.warning("part %s: %d cells are left, the same call goes on", letter, len(cells) - len(results))
            is_whole = False
        if machine.card is not None and arguments.shape == PUBLISHED_SHAPE:
            publish(results)
    return 0 if is_whole else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="only this part; may be repeated")
    parser.add_argument("--shape", choices=SHAPES, default=PUBLISHED_SHAPE, help="model of parts a and d (default 7B)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder of results and logs")
    parser.add_argument("--limit-s", type=float, default=540.0, help="time of one part in one call (default 540)")
    parser.add_argument("--again", action="store_true", help="measure anew what is measured already")
    parser.add_argument("--list", action="store_true", help="what each part answers")
    return parser


def _versions(machine: Machine) -> str:
    return ", ".join(f"{package} {version}" for package, version in machine.versions.items())


def _show(result: Result, out: Path) -> None:
    name = f"{result.part}-{result.cell}"
    color = {"ok": "green", "skipped": "yellow"}.get(result.status, "bold red")
    console.print(f"[{color}]{name}: {result.status}[/] {result.seconds:.0f} s", highlight=False)
    if result.reason:
        console.print(f"  {result.reason}", markup=False, highlight=False)
    if result.status in ("failed", "out of time"):
        console.print(f"  its log: {out / name}.log", markup=False, highlight=False)
    for figures in result.figures.get("tables", ()):
        table = Table(title=figures["title"], title_justify="left", box=None)
        for column in figures["columns"]:
            table.add_column(column)
        for row in figures["rows"]:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
