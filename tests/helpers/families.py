"""Tiny models of many families, with random weights."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(config: PretrainedConfig, *, noise: float = 0.2) -> torch.nn.Module:
    """In evaluation mode, float32; the noise makes outputs depend on the input."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * noise)
    return model
