"""Decoders that are small enough to train from scratch on one small GPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """Width, MLP width, layers and heads of a Llama-like decoder; every head has its own keys and values."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int


SIZES = {
    "nano": Size(192, 512, 8, 6),
    "micro": Size(384, 1024, 10, 6),
    "tiny": Size(768, 2048, 14, 12),
    "small": Size(1024, 2816, 25, 16),
    "medium": Size(1536, 4096, 25, 16),
}
"""About 10 M, 30 M, 125 M, 350 M and 760 M parameters with a vocabulary of 32,000."""

_MAX_POSITIONS = 4096


def model_config(size: Size, vocab_size: int) -> Any:
    """A `transformers.LlamaConfig` with tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def build(name: str, vocab_size: int, device: str = "cpu") -> Any:
    """A freshly initialised `LlamaForCausalLM` in float32; `device="meta"` takes no memory and holds no values."""
    from transformers import LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(model_config(SIZES[name], vocab_size))


def nano_llm(vocab_size: int, device: str = "cpu") -> Any:
    """About 10 M parameters with a vocabulary of 32,000."""
    return build("nano", vocab_size, device)


def micro_llm(vocab_size: int, device: str = "cpu") -> Any:
    """About 30 M parameters with a vocabulary of 32,000."""
    return build("micro", vocab_size, device)


def tiny_llm(vocab_size: int, device: str = "cpu") -> Any:
    """About 125 M parameters with a vocabulary of 32,000."""
    return build("tiny", vocab_size, device)


def small_llm(vocab_size: int, device: str = "cpu") -> Any:
    """About 350 M parameters with a vocabulary of 32,000."""
    return build("small", vocab_size, device)


def medium_llm(vocab_size: int, device: str = "cpu") -> Any:
    """About 760 M parameters with a vocabulary of 32,000."""
    return build("medium", vocab_size, device)


BUILDERS: dict[str, Callable[..., Any]] = {name: functools.partial(build, name) for name in SIZES}


def count_params(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Parameters of a model, tied ones once. A quantised weight counts its values, not its packed bytes."""
    return sum(
        _num_values(parameter) for parameter in model.parameters() if parameter.requires_grad or not trainable_only
    )


def _num_values(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit values into a byte
    return state.shape.numel() if state is not None else parameter.numel()
