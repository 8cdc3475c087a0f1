"""Process set-up before torch is loaded, and the check that a run has a single process.

Nothing happens at import; entry points call `prepare_process` and `check_one_process`.
"""

import ctypes
import os
import signal
import sys
import time

from core.errors import UserError
from core.log import console

# Idle threads sleep instead of spinning, so that torch and vLLM can share a CPU; torch's C++ code warns of nothing.
_READ_WHEN_TORCH_IS_LOADED = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def prepare_process() -> bool:
    """Set the environment variables that torch reads when it is loaded, where they are not set yet.

    Returns:
        Whether that came in time: false where torch was there before and the threads' setting was not, as in a notebook
        that imports torch first. A run on a GPU loses nothing by it, one on a CPU some of its speed.
    """
    in_time = "torch" not in sys.modules or "OMP_WAIT_POLICY" in os.environ
    if in_time:
        for name, value in _READ_WHEN_TORCH_IS_LOADED.items():
            os.environ.setdefault(name, value)
    return in_time


_LET_THE_FIRST_SPEAK_S = 2.0
"""A launcher stops all processes when one ends: the others wait until the first has said why."""


def check_one_process() -> None:
    """Refuse a launcher of several processes; the first of them says so.

    Raises:
        UserError: the launcher started several.
    """
    num_processes = os.environ.get("WORLD_SIZE", "1")
    if num_processes in ("", "0", "1"):
        return
    if os.environ.get("RANK", "0") != "0":
        console.quiet = True
        time.sleep(_LET_THE_FIRST_SPEAK_S)
    raise UserError(
        f"a launcher (torchrun, accelerate launch) started {num_processes} processes: WORLD_SIZE is {num_processes}",
        expected="one process, which drives teacher, student and generator on one GPU",
        remedy="python train.py ..., without the launcher (or unset WORLD_SIZE)",
    )


WATCHED_PARENT = "RLT_ENDS_WITH"
"""Set by a process that starts this one: its process id, with which this one is to end."""
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Where the starter asked for it: be killed as soon as that ends, in whatever way (Linux; elsewhere not)."""
    parent = os.environ.pop(WATCHED_PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before this was set
        os.kill(os.getpid(), signal.SIGKILL)
