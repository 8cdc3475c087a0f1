"""The one GPU of a process: every other one is hidden from it before torch is loaded.

With several in sight transformers multiplies the batch by their number (TRL refuses that), and vLLM takes the first
whatever `model_args.device_map` says.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import UserError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_CHOICE = "RLT_ONE_GPU"
"""`NUMBER=ENTRY`: the GPU that `device_map` numbers NUMBER is the single ENTRY of CUDA_VISIBLE_DEVICES. Child processes
inherit both, and so find the choice already made."""


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES (numbers or UUIDs) up to the first that hides the rest; None: not set."""
    if _VISIBLE not in os.environ:
        return None
    entries = []
    for entry in os.environ[_VISIBLE].split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        entries.append(entry.strip())
    return entries


def show_one_gpu(runs: Sequence[Mapping[str, Any]]) -> None:
    """Leave in CUDA_VISIBLE_DEVICES the GPU that composed (not yet validated) configurations name; `auto`: the first.

    `cuda:N` counts the entries of CUDA_VISIBLE_DEVICES or, without it, as nvidia-smi does. Nothing is done where torch
    is loaded already (it is too late then, and `preflight.hardware` refuses several GPUs), for runs on the CPU, and
    under a launcher that gives each of its processes a GPU.

    Raises:
        UserError: a number beyond the visible GPUs, or runs on different ones.
    """
    numbers = {number for number in map(_gpu_number, runs) if number is not None}
    if "torch" in sys.modules or "LOCAL_RANK" in os.environ or not numbers:
        return
    if len(numbers) > 1:
        raise UserError(
            "a sweep over " + ", ".join(f"cuda:{number}" for number in sorted(numbers)),
            expected="one GPU for a sweep, whose runs follow one another",
            remedy="one command for each GPU, which then run at the same time",
        )
    (number,) = numbers
    entries = visible_gpus()
    if entries == [] or _chosen(number):
        return
    if entries is not None and number >= len(entries):
        raise UserError(
            f"`model_args.device_map` is cuda:{number} with {_VISIBLE}={os.environ[_VISIBLE]}",
            expected="a number that counts its entries from 0",
            remedy="model_args.device_map=auto takes the first of them",
        )
    if entries is None:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's numbers, and those that vLLM looks up
    os.environ[_VISIBLE] = entries[number] if entries is not None else str(number)
    os.environ[_CHOICE] = f"{number}={os.environ[_VISIBLE]}"


def index_in_this_process(number: int) -> int:
    """torch's index of the GPU that `device_map` calls `cuda:NUMBER`: 0 once the others are hidden."""
    return 0 if _chosen(number) else number


def _chosen(number: int) -> bool:
    return os.environ.get(_CHOICE) == f"{number}={os.environ.get(_VISIBLE)}"


def _gpu_number(values: Mapping[str, Any]) -> int | None:
    """None for a run on the CPU, and for what validation will refuse."""
    args = values.get("model_args")
    device_map = args.get("device_map", "auto") if isinstance(args, Mapping) else "auto"
    if device_map in (None, "auto", "cuda"):
        return 0
    match = re.fullmatch(r"cuda:(\d+)", str(device_map))
    return int(match[1]) if match else None
