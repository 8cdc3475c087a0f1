"""One LoRA training step of a random model on the GPU, measured; the counterpart of `memory_simulator`."""

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch

from planner.teacher import TeacherSettings
from rollout.logprobs import span_logprobs
from rollout.types import ScoringRow
from tests.helpers.step_models import build_model, int8_inputs


@dataclass(frozen=True)
class Measured:
    static_bytes: int
    """Allocated before the measured step: base, adapter, gradients, optimizer states."""
    allocated_bytes: int
    reserved_bytes: int
    outside_torch_bytes: int
    """Used on the GPU but not by torch's allocator: CUDA context, cuBLAS."""


def measure_training_step(settings: TeacherSettings) -> Measured:
    """The second of two steps, so that gradients and optimizer states exist."""
    torch.cuda.empty_cache()
    model = build_model(settings, "cuda")
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


def run_step(model: Any, settings: TeacherSettings) -> None:
    """Forward and backward of one micro-batch of random tokens, as the trainer runs them."""
    rows = [
        ScoringRow(
            token_ids=torch.randint(settings.teacher.vocab, (settings.row_len,)).tolist(),
            spans=((settings.max_prompt_len, settings.row_len),),
        )
        for _ in range(settings.micro_batch)
    ]
    with torch.autocast(model.device.type, torch.bfloat16):
        logprobs_N, _ = span_logprobs(model, rows, temperature=0.7, with_entropy=True)
    logprobs_N.sum().backward()
