"""One LoRA training step of a random model on the GPU, measured; the counterpart of `memory_simulator`."""

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from trl.trainer.utils import add_fused_lm_head

from planner.settings import PlanSettings
from tests.helpers.step_models import build_model, int8_inputs


@dataclass(frozen=True)
class Measured:
    static_bytes: int
    """Allocated before the measured step: base, adapter, gradients, optimizer states."""
    allocated_bytes: int
    reserved_bytes: int
    outside_torch_bytes: int
    """Used on the card but not by torch's allocator: CUDA context, cuBLAS."""


def measure_training_step(settings: PlanSettings) -> Measured:
    """The second of two steps, so that gradients and optimizer states exist; TRL's fused head with its kernels."""
    torch.cuda.empty_cache()
    model = model_with_head(settings, "cuda")
    with int8_inputs(released=settings.int8_inputs_released):
        run_step(model, settings)
        optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        optimizer.step()
        static = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_step(model, settings)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return Measured(
        static_bytes=static,
        allocated_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
        outside_torch_bytes=total - free - torch.cuda.memory_reserved(),
    )


def model_with_head(settings: PlanSettings, device: str) -> Any:
    """The teacher with TRL's chunked head, as its trainer makes it."""
    model: Any = build_model(settings, device)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    return model


def run_step(model: Any, settings: PlanSettings) -> None:
    """Forward and backward of one micro-batch of random tokens, as TRL runs them."""
    device = model.get_base_model().get_input_embeddings().weight.device
    input_ids = torch.randint(settings.teacher.vocab, (settings.micro_batch, settings.row_len), device=device)
    attention_mask = torch.ones_like(input_ids)
    if settings.attention == "masked_sdpa":
        attention_mask[:, 0] = 0
    labels = input_ids.clone()
    labels[:, : settings.max_prompt_len] = -100
    with torch.autocast(device.type, torch.bfloat16):
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    outputs.log_probs.sum().backward()
