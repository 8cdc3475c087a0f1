"""The GPU: which one a run is on, what it can do, how much memory it has. The one place that asks torch about it.

What can be known without torch: `core.one_gpu` (which GPUs are visible) and `core.gpu_software` (driver, compiler).
"""

from dataclasses import dataclass

import psutil
import torch

from core.one_gpu import index_in_this_process
from core.units import format_gb, gb

NO_CARD = "torch sees no CUDA device"
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
"""Compute levels: TF32, bf16 and FlashAttention 2 since Ampere, fp8 units since Ada, FlashAttention 3 since Hopper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    """Compute level: 8.0 Ampere (A100), 8.6 / 8.9 consumer Ampere / Ada, 9.0 Hopper, 10.0 and above Blackwell."""
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (compute {self.capability[0]}.{self.capability[1]}, {format_gb(self.total_bytes)})"


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """CUDA devices that torch sees."""
    return torch.cuda.device_count()


def find_card() -> Card | None:
    """The first GPU; None where torch sees none."""
    if not has_gpu():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Card(
        name=properties.name, capability=(properties.major, properties.minor), total_bytes=properties.total_memory
    )


def gpu_bytes() -> int | None:
    """Bytes of the first GPU, as the driver reports them; None where torch sees none."""
    card = find_card()
    return card.total_bytes if card is not None else None


def get_vram() -> float:
    """Decimal GB of the first GPU, as the driver reports them; 0.0 where there is none."""
    return gb(gpu_bytes() or 0)


def pick_device(device_map: str | None) -> torch.device:
    """`auto` (or null): the first GPU where there is one, else the CPU. `cuda:N` as `core.one_gpu` counts."""
    if device_map in (None, "auto"):
        return torch.device("cuda:0" if has_gpu() else "cpu")
    device = torch.device(device_map)
    return torch.device("cuda", index_in_this_process(device.index or 0)) if device.type == "cuda" else device


def memory_of(device: torch.device) -> int:
    """Bytes that the driver reports for a GPU; this machine's RAM for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def free_and_total_bytes() -> tuple[int, int]:
    """Free and total bytes of the first GPU by the driver's count: what torch's cache holds is not free."""
    return torch.cuda.mem_get_info()


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute level of a GPU, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 units; a GPU before Ampere would imitate them."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
