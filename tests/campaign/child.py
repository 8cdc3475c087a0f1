"""What a run's process does before train.py: its folder, environment, streams and faults; then it is train.py."""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.faults import Fault, FaultPoints

TRAIN = Path(__file__).parents[2] / "train.py"
SHARED_MEMORY = "/dev/shm"
_NEW_MOUNTS, _BIND, _RECURSIVE, _PRIVATE = 0x00020000, 4096, 16384, 1 << 18


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of train.py.

    `folder` is the trial's: everything that the call may write lies in it. `shared_memory`: folder that is /dev/shm for
    this process alone (needs root). `counts`: file that is told how often each of `points` was reached.
    """

    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str | None] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    points: tuple[str, ...] = ()
    counts: Path | None = None
    shared_memory: Path | None = None
    stdin: Path | None = None
    limit_bytes: int | None = None
    """Of the address space."""


def run(call: Call, console: Path) -> None:
    """Become `python train.py WORDS`, its output in `console`; ends with its status."""
    output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if call.shared_memory is not None:
        _own_shared_memory(call.shared_memory)
    os.chdir(call.folder)
    for name, value in call.environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    points = FaultPoints(call.faults, call.points, call.folder) if call.faults or call.counts else None
    if call.limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (call.limit_bytes, call.limit_bytes))
    if call.stdin is not None:
        sys.stdin = open(call.stdin)  # noqa: SIM115 - the process's own
    sys.argv = [str(TRAIN), *call.words]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        if points is not None and call.counts is not None:
            call.counts.write_text(json.dumps(points.counts))


def _own_shared_memory(folder: Path) -> None:
    """Make `folder` this process's /dev/shm, by a mount that no other process sees."""
    library = ctypes.CDLL(None, use_errno=True)
    arguments = [(None, b"/", None, _RECURSIVE | _PRIVATE, None)]
    arguments += [(os.fsencode(folder), SHARED_MEMORY.encode(), None, _BIND, None)]
    if library.unshare(_NEW_MOUNTS) or any(library.mount(*values) for values in arguments):
        raise OSError(ctypes.get_errno(), "a /dev/shm of its own")
