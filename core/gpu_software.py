"""Driver, C compiler and Python's headers: what a run on a GPU needs besides Python packages.

Standard library only: `scripts/setup_env.py` asks before it installs gigabytes.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from core.errors import UserError

CUDA_OF_PACKAGES = 13
"""CUDA version that torch 2.11 to 2.13 and vLLM 0.26 to 0.32 are built for, as pip installs them."""
_LEAST_DRIVER = {12: 525, 13: 580}
"""CUDA version -> branch of the first Linux driver that runs it."""


def driver_version() -> str | None:
    """The NVIDIA driver's version, such as 580.65.06; None where no driver answers."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.split("\n")[0].strip() if result.returncode == 0 else None


def driver_obstacle(driver: str | None, cuda: int) -> UserError | None:
    """Why this driver cannot run packages that are built for CUDA `cuda`; None if it can, or if nothing is known.

    An older driver serves where NVIDIA's compatibility libraries are in the library path, as in some containers.
    """
    branch = re.match(r"\d+", driver or "")
    least = _LEAST_DRIVER.get(cuda)
    if branch is None or least is None or int(branch[0]) >= least or _cuda_of_libcuda() >= cuda:
        return None
    return UserError(
        f"NVIDIA driver {driver}",
        expected=f"{least} or newer: torch and vLLM are built for CUDA {cuda}",
        remedy=f"install a driver of branch R{least} or later, or set CUDA_VISIBLE_DEVICES=-1 to use the CPU",
    )


def compiler_obstacle() -> UserError | None:
    """Why Triton, which vLLM and torch.compile use on a GPU, cannot compile its C files here; None if it can."""
    wanted = "a C compiler and Python's headers: Triton, which vLLM uses, compiles a small C file on first use"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        given = f"no program {' or '.join(compilers)} on the PATH" + (" (CC)" if "CC" in os.environ else "")
        return UserError(given, expected=wanted, remedy="apt-get install gcc, or set CC to a C compiler")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own, as Triton has it
    searched = [sysconfig.get_paths(scheme=scheme)["include"]]
    searched += [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(":")]
    if any((Path(folder) / "Python.h").is_file() for folder in searched if folder):
        return None
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return UserError(
        f"no Python.h in {searched[0]}",
        expected=wanted,
        remedy=f"apt-get install {version}-dev, or a Python that brings its headers (uv, conda, pyenv) as PYTHON",
    )


def _cuda_of_libcuda() -> int:
    """The CUDA version that the driver's library in the library path supports; 0 where there is none."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000 if status == 0 else 0
