"""train.py as a command: what it said, and the CPU time that it took."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from schemas.compose import CONFIG_ROOT

ROOT = CONFIG_ROOT.parent


@dataclass(frozen=True)
class Done:
    status: int
    text: str
    """stdout and stderr."""
    cpu_s: float
    """User and system time, unlike wall time the same on a busy machine."""


def run_command(*command: str | Path, cwd: Path, timeout_s: float = 300, **environment: str) -> Done:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.returncode, done.stdout, cpu_s)


def run_train(*words: str, cwd: Path, **environment: str) -> Done:
    return run_command(sys.executable, ROOT / "train.py", *words, cwd=cwd, **environment)
