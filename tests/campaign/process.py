"""Runs as processes: forked from one that has imported everything (a start takes no time), or by the command line."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.campaign import child
from tests.campaign.child import TRAIN, Call

TRACEBACK = "Traceback (most recent call last)"
_TIME_LIMIT_S = 240.0


@dataclass(frozen=True)
class Ended:
    """How a run's process ended. `status` as the shell has it, but -9 for a process that signal 9 ended."""

    status: int | None
    """None: it hung, and was killed at the time limit."""
    text: str
    """What it said, stdout and stderr."""
    seconds: float

    @property
    def says(self) -> str:
        """What it said, in one line of single spaces: messages are wrapped."""
        return " ".join(self.text.split())

    @property
    def num_tracebacks(self) -> int:
        return self.text.count(TRACEBACK) + len(re.findall(r"Traceback \(most recent call last\) ─", self.text))

    @property
    def last_lines(self) -> str:
        return "\n".join(self.text.rstrip().splitlines()[-25:])


class Process:
    """A run at work, begun by `Starter`."""

    def __init__(self, pid: int, poll: Callable[[], int | None], console: Path) -> None:
        self.pid, self.console = pid, console
        self._poll, self._start_s = poll, time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self._poll() is None

    def send(self, number: int) -> bool:
        """Send a signal; False where the process had ended."""
        if not self.is_alive:
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, seconds: float) -> bool:
        """Wait, for so long at most; whether the process is still at work."""
        deadline_s = time.monotonic() + seconds
        while self.is_alive and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return self.is_alive

    def end(self, limit_s: float = _TIME_LIMIT_S) -> Ended:
        hung = self.wait(limit_s)
        if hung:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10)
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return Ended(None if hung else self._poll(), text, time.monotonic() - self._start_s)


class Starter:
    """Starts runs, also from several threads. The process that they are forked from lives as long as this one.

    Args:
        consoles: folder for what the runs say.
    """

    def __init__(self, consoles: Path) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "tests.campaign.warm"])
        self._consoles, self._numbers = consoles, itertools.count()
        self._lock = threading.Lock()
        """multiprocessing asks after all its children whenever one starts, and two threads may not ask after one."""

    def fork(self, call: Call) -> Process:
        """A run without seconds of imports: a process of its own all the same, with its own pid, folder and streams."""
        console = self._console()
        with self._lock:
            process = self._context.Process(target=child.run, args=(call, console), daemon=True)
            process.start()
        assert process.pid is not None
        return Process(process.pid, lambda: self._status(process), console)

    def command(self, call: Call, *prefix: str, **streams: int) -> Process:
        """The real command line, `prefix` before it (`nohup`); its streams as for `subprocess.Popen`."""
        console = self._console()
        environment = {k: v for k, v in (os.environ | dict(call.environment)).items() if v is not None}
        words = [*prefix, sys.executable, str(TRAIN), *call.words]
        with open(console, "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output.fileno(), "stderr": output.fileno()} | streams
            process = subprocess.Popen(words, cwd=call.folder, env=environment, **streams)  # type: ignore[call-overload]
        return Process(process.pid, process.poll, console)

    def call_function(self, function: Callable[..., object], *args: object) -> None:
        """Call a function of a module in a forked process: torch is not used in this one."""
        with self._lock:
            process = self._context.Process(target=function, args=args)
            process.start()
            process.join()
        assert process.exitcode == 0, function

    def _status(self, process: BaseProcess) -> int | None:
        with self._lock:
            return process.exitcode

    def _console(self) -> Path:
        return self._consoles / f"{next(self._numbers):05d}.txt"
