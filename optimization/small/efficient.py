"""Small-budget training in one name: sizes, memory, precision, quantisation, optimizers.

    from optimization import Efficient

    model = Efficient.micro_llm(vocab_size=8_000)
    model = Efficient.enable_checkpointing(model)
    print(Efficient.estimate_memory(model, batch_size=4, seq_len=1024, checkpointing=True))
    optimizer = Efficient.get_optimizer(model, "adam8bit", lr=1e-3)
    model, optimizer, scaler = Efficient.mixed_precision(model, optimizer)

examples/train_small.py is a whole run.
"""

from optimization.gpu import get_vram
from optimization.memory_optim import enable_checkpointing
from optimization.optimizers import get_optimizer
from optimization.small import models
from optimization.small.estimates import estimate_memory, estimate_savings, estimate_training_savings
from optimization.small.mixed_precision import MixedPrecision
from optimization.small.quantize import Quantize
from optimization.small.recommend import Recommendation, recommend_config


class Efficient:
    """The functions below under one name; it holds no state."""

    nano_llm = staticmethod(models.nano_llm)
    micro_llm = staticmethod(models.micro_llm)
    tiny_llm = staticmethod(models.tiny_llm)
    small_llm = staticmethod(models.small_llm)
    medium_llm = staticmethod(models.medium_llm)
    count_params = staticmethod(models.count_params)
    enable_checkpointing = staticmethod(enable_checkpointing)
    mixed_precision = MixedPrecision
    quantize = Quantize
    get_optimizer = staticmethod(get_optimizer)
    get_vram = staticmethod(get_vram)
    recommend_config = staticmethod(recommend_config)
    estimate_memory = staticmethod(estimate_memory)
    estimate_savings = staticmethod(estimate_savings)
    estimate_training_savings = staticmethod(estimate_training_savings)


class Helpers:
    """Helpers to call before training; each is also a function of `Efficient`."""

    count_params = staticmethod(models.count_params)
    get_vram = staticmethod(get_vram)
    recommend_config = staticmethod(recommend_config)
    estimate_memory = staticmethod(estimate_memory)
    estimate_savings = staticmethod(estimate_savings)


__all__ = ["Efficient", "Helpers", "Recommendation"]
