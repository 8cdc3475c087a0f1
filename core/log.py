"""The project's one logger and console. Nothing happens at import; entry points call `configure_logging` once."""

import importlib.util
import io
import logging
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.control import Control
from rich.logging import RichHandler
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from core.units import format_duration
from schemas.secrets import masked

_FILE_WIDTH, _MAX_EARLIER_TEXTS = 160, 1000


class CopyingConsole(Console):
    """A console whose text can go to a log file too: plain, of a fixed width, without progress bars.

    What is printed before the file is opened is kept for it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._earlier: deque[str] = deque(maxlen=_MAX_EARLIER_TEXTS)
        self._log_file: IO[str] | None = None
        self.is_lost = False
        """Whether what is printed does not reach stdout any more."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if all(isinstance(thing, Control) for thing in objects) and objects:
            return  # a progress bar moves
        text = io.StringIO()
        Console(file=text, width=_FILE_WIDTH, color_system=None, force_terminal=False).print(*objects, **options)
        self.copy("".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()))

    def copy(self, text: str) -> None:
        """Write text to the file alone; secrets are masked."""
        text = masked(text)
        if self._log_file is None:
            self._earlier.append(text)
            return
        try:
            self._log_file.write(text)
            self._log_file.flush()
        except OSError as error:  # what the run itself cannot write ends it; that its log is cut short need not
            log_file = self._log_file
            self.end_copy()
            self.print(f"{log_file.name} ends here: {error.strerror}", markup=False, highlight=False)

    def copy_to(self, path: Path) -> None:
        """Append to a file from now on, after a line with the date."""
        self.end_copy()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by end_copy
        self.copy(f"--- {datetime.now():%Y-%m-%d %H:%M:%S}\n" + "".join(self._earlier))
        self._earlier.clear()

    def end_copy(self) -> None:
        if self._log_file is not None:
            with suppress(OSError):  # of a full disk, to which the rest of the buffer does not go either
                self._log_file.close()
            self._log_file = None

    def _check_buffer(self) -> None:
        """Write what was printed. A pipe without a reader, a terminal that was closed and a full disk behind stdout
        raise the same kind of error here, in whatever thread prints: see `on_broken_pipe`."""
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Nobody reads stdout any more: go on with stderr while that is there, and in the log file; and stop as after a
        hang-up (SIGHUP), which saves the step of a run that trains, and which a run under `nohup` does not hear."""
        self.quiet = self.is_lost  # stderr is gone too
        if self.is_lost:
            return
        self.is_lost = True
        self.file = sys.stderr
        with suppress(OSError, ValueError):  # no file behind it, as in tests and notebooks
            stdout_fd = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout_fd)  # what others print, and Python's flush at the end
        self.print("stdout is gone: nobody reads what is shown there")
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            raise SystemExit(1)
        signal.raise_signal(signal.SIGHUP)


console = CopyingConsole()
if not (console.is_jupyter or (sys.stdout is not None and sys.stdout.isatty())):
    console.width = _FILE_WIDTH  # a file or a pipe; terminals and notebooks have a width of their own
log = logging.getLogger("rlt")

# bitsandbytes logs one line per int8 matmul on a CPU; the others repeat what our own messages say.
_NOISY_LOGGERS = {
    "bitsandbytes": logging.ERROR,
    "bitsandbytes.autograd._functions": logging.ERROR,
    "httpx": logging.WARNING,
    "vllm": logging.ERROR,
    "datasets": logging.WARNING,
    "math_verify": logging.ERROR,  # it shows whatever it cannot read
}


def configure_logging(level: str = "INFO") -> None:
    """Send our log lines to the console and quieten the libraries'. Safe to call twice."""
    _make_streams_usable()
    log.setLevel(level)
    log.propagate = False
    log.handlers[:] = [RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", markup=False)]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
    warnings.filterwarnings(
        "ignore", message="TRL currently supports vLLM versions"
    )  # its engine is not the one we use
    for name, noisy_level in _NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(noisy_level)


def _make_streams_usable() -> None:
    """A stream that is closed goes nowhere, and what a console's encoding does not have is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def long_work(what: str) -> Iterator[None]:
    """Log the start and the duration of long work; on a terminal the seconds so far are shown while it lasts."""
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
