"""Reductions of one row's per-token values to a number. A row is never empty: the reward handles empty rows itself."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
    "median": torch.median,
    "first_quartile": lambda values_T: torch.quantile(values_T, 0.25),
    "last_quartile": lambda values_T: torch.quantile(values_T, 0.75),
}


def reduce_rows(name: str, rows: Sequence[Tensor]) -> Tensor:
    """Reduce ragged rows ([T_i] each, T_i >= 1) to [B]."""
    reduction = REDUCTIONS[name]
    return torch.stack([reduction(values_T) for values_T in rows])
