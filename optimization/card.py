"""The GPU that optimisations are chosen for."""

import importlib.util
from dataclasses import dataclass

import torch

from core.units import format_gb, gb

NO_CARD = "torch sees no CUDA device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    capability: tuple[int, int]
    """Compute level: 8.0 Ampere (A100), 8.6 / 8.9 consumer Ampere / Ada, 9.0 Hopper, 10.0 and above Blackwell."""
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (compute {self.capability[0]}.{self.capability[1]}, {format_gb(self.total_bytes)})"


def find_card() -> Card | None:
    """The first GPU; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Card(
        name=properties.name, capability=(properties.major, properties.minor), total_bytes=properties.total_memory
    )


def get_vram() -> float:
    """Decimal GB of the first GPU, as the driver reports them; 0.0 where there is none."""
    card = find_card()
    return gb(card.total_bytes) if card is not None else 0.0


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
