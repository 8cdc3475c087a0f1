"""Faults inside a run: what happens when it reaches a point for the n-th time. Put in before train.py begins.

A point is a function of the project or of a library (`module:name` or `module:Class.name`), before or after its call,
or `files`: the moments before the run makes, opens for writing, renames or removes something in its trial's folder.
"""

import functools
import importlib
import inspect
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = "files"
BALLAST = "ballast"
"""File of a trial's folder that takes the rest of its filesystem."""
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True)
class Fault:
    """An action at the `nth` time that a run reaches `point`; `after`: when that call has returned.

    Actions: `kill`; `signal:NAME`; `raise:NAME` of `EXCEPTIONS`; `fill:BYTES` fills the trial's filesystem but for so
    much; `clock:SECONDS` moves what `time.time` says.
    """

    point: str
    nth: int = 1
    action: str = "kill"
    after: bool = False

    def __str__(self) -> str:
        when = "after" if self.after else "before"
        return f"{self.action} {when} {self.point} no. {self.nth}"


def exception_of(name: str) -> BaseException:
    """What is raised under a name: as the library that usually raises it does."""
    import torch

    import core.errors

    known: dict[str, Callable[[], BaseException]] = {
        "RuntimeError": lambda: RuntimeError("a bug, as the campaign puts it in"),
        "OSError": lambda: OSError(5, os.strerror(5)),
        "DiskFull": lambda: OSError(28, os.strerror(28)),
        "MemoryError": lambda: MemoryError("host memory"),
        "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "KeyboardInterrupt": KeyboardInterrupt,
        "NonFiniteError": lambda: core.errors.NonFiniteError("the loss is nan"),
    }
    return known[name]()


class FaultPoints:
    """The points of a run that are watched, how often each was reached, and the faults that are due there.

    Args:
        points: functions to count and to fail at, besides the faults' own.
        folder: of the trial; `files` are the changes in it.
    """

    def __init__(self, faults: Sequence[Fault], points: Sequence[str], folder: Path) -> None:
        self._faults, self._folder = faults, os.path.realpath(folder)
        self.counts: Counter[str] = Counter()
        self._acting = False
        sys.addaudithook(self._audit)
        for point in dict.fromkeys([*points, *(fault.point for fault in faults if fault.point != FILES)]):
            _watch(point, self._reach)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and not self._acting and _changes_files(event, args):
            directory_fds = [value for value in args[1:] if isinstance(value, int) and value >= 0]
            parent = (
                f"/proc/self/fd/{directory_fds[-1]}" if event in ("os.remove", "os.rmdir") and directory_fds else ""
            )
            path = os.path.realpath(os.path.join(parent, os.path.dirname(os.fspath(args[0]))))
            if path == self._folder or path.startswith(self._folder + "/"):
                self._reach(FILES, after=False)

    def _reach(self, point: str, *, after: bool) -> None:
        if not after:
            self.counts[point] += 1
        for fault in self._faults:
            if (fault.point, fault.after, fault.nth) == (point, after, self.counts[point]):
                self._act(fault)

    def _act(self, fault: Fault) -> None:
        action, _, value = fault.action.partition(":")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "signal":
            os.kill(os.getpid(), signal.Signals[f"SIG{value}"])
        elif action == "raise":
            raise exception_of(value)
        elif action == "fill":
            self._fill(int(value))
        elif action == "clock":
            _move_clock(float(value))
        else:
            raise ValueError(f"a fault that is not known: {fault.action}")

    def _fill(self, left_bytes: int) -> None:
        self._acting = True
        with open(os.path.join(self._folder, BALLAST), "ab") as ballast:
            usage = os.statvfs(self._folder)
            if (num_bytes := usage.f_bavail * usage.f_frsize - left_bytes) > 0:
                os.posix_fallocate(ballast.fileno(), ballast.tell(), num_bytes)
        self._acting = False


def _changes_files(event: str, args: tuple[Any, ...]) -> bool:
    if not isinstance(args[0], str | bytes | os.PathLike):
        return False  # a descriptor
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return event != "open" or bool(isinstance(args[2], int) and args[2] & writes)


def _watch(point: str, reach: Callable[..., None]) -> None:
    """Put a wrapper around a function, under every name that a loaded module knows it by."""
    module_name, _, path = point.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        reach(point, after=False)
        result = original(*args, **kwargs)
        reach(point, after=True)
        return result

    setattr(owner, name, watched)
    if inspect.ismodule(owner):
        for module in list(sys.modules.values()):
            names = [key for key, value in getattr(module, "__dict__", {}).items() if value is original]
            for known_as in names:
                setattr(module, known_as, watched)


def _move_clock(seconds: float) -> None:
    real = time.time
    time.time = lambda: real() + seconds
