"""Forward passes without what only training needs."""

import contextlib
from collections.abc import Iterator

import bitsandbytes as bnb
from torch import nn

_QUANTISED = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing (which would switch the key-value cache off); put back afterwards.

    Quantised linears are in training mode meanwhile, which on a CPU (and nowhere else) chooses bitsandbytes' kernel:

    * 8 bits: 16-bit activations instead of int8 ones, so that a policy is sampled and scored as it is trained. It is
      also four times as fast.
    * 4 bits: the layout that has a backward. In evaluation mode bitsandbytes re-packs the weights for good, and the
      next training step fails.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = isinstance(module, _QUANTISED)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
