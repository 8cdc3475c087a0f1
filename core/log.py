"""The project's one logger and console. Nothing happens at import; entry points call `configure_logging` once."""

import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from core.units import format_duration

console = Console()
if not (console.is_jupyter or sys.stdout.isatty()):
    console.width = 160  # a file or a pipe; terminals and notebooks have a width of their own
log = logging.getLogger("rlt")

# bitsandbytes logs one line per int8 matmul on a CPU; the others repeat what our own messages say.
_NOISY_LOGGERS = {
    "bitsandbytes": logging.ERROR,
    "bitsandbytes.autograd._functions": logging.ERROR,
    "httpx": logging.WARNING,
    "vllm": logging.ERROR,
    "datasets": logging.WARNING,
}


def configure_logging(level: str = "INFO") -> None:
    """Send our log lines to the console and quieten the libraries'. Safe to call twice."""
    log.setLevel(level)
    log.propagate = False
    log.handlers[:] = [RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", markup=False)]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
    warnings.filterwarnings(
        "ignore", message="TRL currently supports vLLM versions"
    )  # its engine is not the one we use
    for name, noisy_level in _NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(noisy_level)


@contextmanager
def long_work(what: str) -> Iterator[None]:
    """Say what is begun and how long it took; on a terminal the seconds so far are shown while it lasts."""
    log.info("%s", what)
    start_s = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not (console.is_terminal and can_animate())
    ) as progress:
        progress.add_task(what, total=None)
        yield
    log.info("%s: done in %s", what, format_duration(time.perf_counter() - start_s))


def can_animate() -> bool:
    """Whether a progress bar can be drawn: in a notebook that takes ipywidgets; lines of the log show everywhere."""
    return not console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None
