"""What a process needs before torch is loaded. Nothing happens at import; entry points call `prepare_process`."""

import os
import sys

# Idle threads sleep instead of spinning, so that torch and vLLM can share a CPU; torch's C++ code warns of nothing.
_READ_WHEN_TORCH_IS_LOADED = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def prepare_process() -> bool:
    """Set what torch reads when it is loaded, where nothing is set yet.

    Returns:
        Whether that came in time: false where torch was there before and the threads' setting was not, as in a notebook
        that imports torch first. A run on a GPU loses nothing by it, one on a CPU some of its speed.
    """
    in_time = "torch" not in sys.modules or "OMP_WAIT_POLICY" in os.environ
    if in_time:
        for name, value in _READ_WHEN_TORCH_IS_LOADED.items():
            os.environ.setdefault(name, value)
    return in_time
