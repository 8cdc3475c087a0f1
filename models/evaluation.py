"""Forward passes of a model that is being trained, without what only training needs."""

import contextlib
from collections.abc import Iterator

import bitsandbytes as bnb
from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing (which would switch the key-value cache off); put back afterwards.

    int8 linears keep their mode: on a CPU bitsandbytes multiplies differently in training and in evaluation (16-bit
    against int8 activations), and a sampled or scored policy should compute as the trained one does.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if not isinstance(module, bnb.nn.Linear8bitLt):
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
