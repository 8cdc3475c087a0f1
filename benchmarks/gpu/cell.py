"""The process of one cell: `python -m benchmarks.gpu.cell TASK`, started by the runner."""

import os
import sys

# As train.py sets them, before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import SKIPPED_STATUS, Figures
from core.errors import UserError
from core.log import configure_logging, log


class SkipCell(Exception):
    """Raised where a cell has nothing to measure here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Arguments of a cell."""

    cell: str
    shape: str
    """Name of a model shape (`random_model.py`); `tiny` makes everything small enough for a CPU."""
    out: Path
    arguments: dict[str, Any]

    @property
    def is_tiny(self) -> bool:
        return self.shape == "tiny"

    @property
    def scratch(self) -> Path:
        """Folder for models and run folders; may be deleted between calls."""
        folder = self.out / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def require_cuda() -> None:
    """
    Raises:
        SkipCell: torch sees no CUDA device.
    """
    from optimization.gpu import has_gpu

    if not has_gpu():
        raise SkipCell("torch sees no CUDA device")


def main(task: dict[str, Any]) -> int:
    configure_logging()
    cell = task["cell"]
    setup = Setup(cell=cell["name"], shape=task["shape"], out=Path(task["out"]), arguments=cell["arguments"])
    figures = Figures(setup.out / f"{cell['part']}-{cell['name']}.figures")
    module, _, function = cell["function"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(setup, figures)
    except SkipCell as reason:
        log.info("skipped: %s", reason)
        figures.update(skipped=str(reason))
        return SKIPPED_STATUS
    except UserError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    # Under its own name, so that cells which import SkipCell raise the class that is caught here.
    from benchmarks.gpu import cell as this_module

    sys.exit(this_module.main(json.loads(sys.argv[1])))
