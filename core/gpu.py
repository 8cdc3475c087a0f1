"""The GPU of this machine as its driver reports it, without torch."""

import shutil
import subprocess
from dataclasses import dataclass

from core.one_gpu import visible_gpus


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    driver: str
    total_bytes: int
    used_bytes: int


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, as its driver reports it; None without a driver or a GPU."""
    visible = visible_gpus()
    if (program := shutil.which("nvidia-smi")) is None or visible == []:
        return None
    query = "name,driver_version,memory.total,memory.used"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    if visible and not visible[0].startswith("MIG"):  # nvidia-smi reports the whole GPU of a part
        command.append(f"--id={visible[0]}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=5)
    if result.returncode or not result.stdout.strip():
        return None
    name, driver, total_mib, used_mib = (cell.strip() for cell in result.stdout.splitlines()[0].split(","))
    return Gpu(name=name, driver=driver, total_bytes=int(total_mib) * 2**20, used_bytes=int(used_mib) * 2**20)
