"""A real step that trains every parameter of a small model, every storage tracked."""

import contextlib
from typing import Any

import torch
from transformers import LlamaForCausalLM

from optimization.optimizers import get_optimizer
from optimization.small.models import Size, model_config
from tests.helpers.memory_simulator import MemoryTracker


def small_model(size: Size, vocab_size: int, precision: str = "fp32", seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(size, vocab_size))
    return model.bfloat16() if precision == "bf16" else model


def measured_peak_bytes(model: Any, batch: int, length: int, precision: str, optimizer_name: str = "adamw") -> int:
    """Of the second of two steps, when the optimizer's states exist."""
    model.train()
    tracker = MemoryTracker()
    for parameter in model.parameters():
        tracker.track(parameter)
    optimizer = get_optimizer(model, optimizer_name, lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (batch, length))
    with tracker:
        for _ in range(2):
            tracker.peak_bytes = 0
            with torch.autocast("cpu", torch.bfloat16) if precision == "mixed" else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak_bytes
