"""The device of a run, and how much memory it has."""

import psutil
import torch

from core.one_gpu import index_in_this_process


def pick_device(device_map: str | None) -> torch.device:
    """`auto` (or null): the first GPU where there is one, else the CPU. `cuda:N` as `core.one_gpu` counts."""
    if device_map in (None, "auto"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(device_map)
    return torch.device("cuda", index_in_this_process(device.index or 0)) if device.type == "cuda" else device


def memory_of(device: torch.device) -> int:
    """Bytes that the driver reports for a GPU; this machine's RAM for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
