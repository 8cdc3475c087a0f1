"""Evaluation mode: forward passes without what only training needs."""

import contextlib
from collections.abc import Iterator

from torch import nn

from optimization.bitsandbytes_patches import stays_in_training_mode


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing (which would switch the key-value cache off); put back afterwards.

    Quantised linears compute as in training meanwhile (`stays_in_training_mode`).
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = stays_in_training_mode(module)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
