"""Cells for tests of the runner: what measurements do, without measuring."""

import time

from benchmarks.gpu.cell import Setup, SkipCell
from benchmarks.gpu.runner import Figures
from core.errors import UserError


def works(setup: Setup, figures: Figures) -> None:
    figures.update(shape=setup.shape, argument=setup.arguments["number"])
    figures.add_table("numbers", ("one",), [["1"]])


def skips(setup: Setup, figures: Figures) -> None:
    raise SkipCell("nothing to measure here")


def fails(setup: Setup, figures: Figures) -> None:
    figures.update(measured_before="4.2")
    raise RuntimeError("the GPU is on fire")


def refused(setup: Setup, figures: Figures) -> None:
    raise UserError("a thing", expected="another", remedy="take the other")


def hangs(setup: Setup, figures: Figures) -> None:
    figures.update(measured_before="4.2")
    print("compiling for ever", flush=True)
    time.sleep(600)
