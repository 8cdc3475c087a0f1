"""One step of supervised fine-tuning on the meta device, every storage tracked, with TRL's head in place of ours.

Real: transformers' model code, checkpointing, adapters, quantised linears, TRL's `ChunkedLogProbFunction`. Left out:
what its Triton kernels compute, which they do in place. Letters as in tests/helpers/memory_simulator.py.
"""

import contextlib
import gc
import logging
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob

from planner.sft import SupervisedSettings
from tests.helpers.memory_simulator import (
    Bf16Autocast,
    MemoryTracker,
    Simulated,
    _drop_large,
    _on_meta,
    _optimizer_states,
    _restore,
    _state_tensors,
)
from tests.helpers.step_models import build_model, int8_inputs, random_causal_lm
from trainers.sft import _TILE_COLUMNS

_TRITON = {"_use_triton": lambda device: True, "_addmm_fp32": lambda acc, a, b: None}


class _InPlaceKernel:
    """A Triton kernel: it allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def simulate_supervised_step(settings: SupervisedSettings) -> Simulated:
    """Peak of allocated bytes in one micro-batch's forward and backward, gradients of an earlier one present."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = _whole_model(settings) if settings.trains_all else build_model(settings)
    tracker, autocast = MemoryTracker(), Bf16Autocast()
    for tensor in _state_tensors(model):
        tracker.track(tensor)
    kept = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            kept += [parameter.grad, *_states(name, parameter, settings)]
    for tensor in kept:
        tracker.track(tensor)
    static = tracker.live_bytes
    with contextlib.ExitStack() as stack:
        stack.enter_context(int8_inputs(released=settings.int8_inputs_released))
        if settings.autocast:
            stack.enter_context(_on_meta(settings.attention, autocast))
        else:
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device_type=None: False))
        stand_in = {"sdpa": _attention(settings)}
        stack.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, stand_in))
        for name, value in _TRITON.items():
            stack.enter_context(mock.patch.object(chunked_logprob, name, value))
        for name in ("_forward_kernel", "_backward_kernel"):
            stack.enter_context(mock.patch.object(chunked_logprob, name, _InPlaceKernel()))
        stack.enter_context(
            mock.patch.object(chunked_logprob, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True)
        )
        stack.enter_context(tracker)
        _forward_backward(model, settings, autocast)
    del model, kept
    gc.collect()
    return Simulated(static, tracker.peak_bytes)


def _whole_model(settings: SupervisedSettings) -> Any:
    with torch.device("meta"):
        model = random_causal_lm(settings, torch.float32 if settings.precision == "fp32" else torch.bfloat16).train()
    if settings.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _attention(settings: SupervisedSettings) -> Any:
    """A kernel that keeps its inputs and its output; autocast casts to 16 bits before it."""

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if settings.autocast:
            q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=kwargs["scaling"])[0]
        return out.transpose(1, 2).contiguous(), None

    return attention


def _states(name: str, parameter: Tensor, settings: SupervisedSettings) -> list[Tensor]:
    """bitsandbytes' 8-bit Adam; Muon's momentum for the matrices of the blocks, AdamW's moments for the rest."""
    if settings.optimizer != "muon":
        return _optimizer_states(parameter)
    is_matrix = name.endswith("proj.weight")
    return [torch.empty_like(parameter) for _ in range(1 if is_matrix else 2)]


def _forward_backward(model: nn.Module, settings: SupervisedSettings, autocast: Bf16Autocast) -> None:
    causal_lm: Any = model if settings.trains_all else model.get_base_model()
    num_tokens = settings.micro_batch_tokens
    input_ids = torch.empty(settings.micro_batch, settings.row_len, dtype=torch.long, device="meta")
    model_module = sys.modules[type(causal_lm.model).__module__]
    hooks: Any = contextlib.nullcontext()
    if settings.checkpointing == "layers_offloaded":
        hooks = torch.autograd.graph.saved_tensors_hooks(_drop_large, _restore)
    with hooks, mock.patch.object(model_module, "create_causal_mask", lambda **_: None):
        hidden_BTH = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state
    # TRL picks the learned positions by a boolean mask; the same copy without data-dependent shapes.
    indices_N = torch.empty(num_tokens, dtype=torch.long, device="meta")
    logprobs_N = chunked_logprob.ChunkedLogProbFunction.apply(
        hidden_BTH.flatten(0, 1).index_select(0, indices_N),
        causal_lm.lm_head.weight,
        None,
        indices_N,
        1.0,
        min(_TILE_COLUMNS, settings.teacher.vocab),
        None,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )[0]
    del hidden_BTH
    loss = -logprobs_N.sum()
    autocast.forward_ended()
    loss.backward()
