"""Small-budget training in one name: sizes, memory, precision, quantisation, optimizers.

    from optimization import Efficient

    model = Efficient.micro_llm(vocab_size=8_000)
    model = Efficient.enable_checkpointing(model)
    print(Efficient.estimate_memory(model, batch_size=4, seq_len=1024, checkpointing=True))
    optimizer = Efficient.get_optimizer(model, "adam8bit", lr=1e-3)
    model, optimizer, scaler = Efficient.mixed_precision(model, optimizer)

examples/train_small.py is a whole run.
"""

from optimization import small_models
from optimization.card import get_vram
from optimization.estimates import estimate_memory, estimate_savings, estimate_training_savings
from optimization.memory_optim import enable_checkpointing
from optimization.mixed_precision import MixedPrecision
from optimization.optimizers import get_optimizer
from optimization.quantize import Quantize
from optimization.recommend import Recommendation, recommend_config


class Efficient:
    """The functions below under one name; it holds no state."""

    nano_llm = staticmethod(small_models.nano_llm)
    micro_llm = staticmethod(small_models.micro_llm)
    tiny_llm = staticmethod(small_models.tiny_llm)
    small_llm = staticmethod(small_models.small_llm)
    medium_llm = staticmethod(small_models.medium_llm)
    count_params = staticmethod(small_models.count_params)
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
    """Questions to ask before training; each is also a function of `Efficient`."""

    count_params = staticmethod(small_models.count_params)
    get_vram = staticmethod(get_vram)
    recommend_config = staticmethod(recommend_config)
    estimate_memory = staticmethod(estimate_memory)
    estimate_savings = staticmethod(estimate_savings)


__all__ = ["Efficient", "Helpers", "Recommendation"]
