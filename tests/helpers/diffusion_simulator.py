"""One training step of a new masked-diffusion model on the meta device, every storage tracked.

As many tokens are masked as the plan assumes. Attention is a stand-in for the GPU's kernel, and bf16 autocast is
emulated (tests/helpers/memory_simulator.py).
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.llada import LladaConfig, LladaModel
from planner.masked_diffusion import MaskedDiffusionSettings
from tests.helpers.memory_simulator import Bf16Autocast, MemoryTracker, Simulated


def simulate_diffusion_step(settings: MaskedDiffusionSettings) -> Simulated:
    """Static bytes: float32 weights, gradients and states of AdamW or Muon; peak: with forward and backward."""
    shape, autocast, tracker = settings.teacher, Bf16Autocast(), MemoryTracker()
    config = LladaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=shape.max_positions,
    )
    with torch.device("meta"):
        model = LladaModel._from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
        if settings.checkpointing == "layers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        states = [
            torch.empty_like(parameter)
            for name, parameter in model.named_parameters()
            for _ in range(1 if settings.optimizer == "muon" and name.endswith("proj.weight") else 2)
        ]
        token_ids_BT = torch.zeros(settings.micro_batch, settings.row_len, dtype=torch.long)
        rows_N, columns_N = (
            index.reshape(-1)[: settings.num_scored]
            for index in torch.meshgrid(
                torch.arange(settings.micro_batch), torch.arange(settings.row_len), indexing="ij"
            )
        )
        mask = None
        if settings.attention == "masked_sdpa":
            mask = torch.ones(settings.micro_batch, 1, settings.row_len, settings.row_len, dtype=torch.bool)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for tensor in (*model.parameters(), *model.buffers(), *states, *(p.grad for p in model.parameters())):
        tracker.track(tensor)
    static = tracker.live_bytes
    with contextlib.ExitStack() as stack:
        stand_in = _attention(autocast if settings.autocast else None)
        stack.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": stand_in}))
        if settings.autocast:
            stack.enter_context(mock.patch.object(nn.functional, "linear", autocast.linear))
        stack.enter_context(tracker)
        loss = _loss(model, token_ids_BT, mask, rows_N, columns_N)
        autocast.forward_ended()
        loss.backward()
    return Simulated(static, tracker.peak_bytes)


def _loss(model: LladaModel, token_ids_BT: Tensor, mask: Tensor | None, rows_N: Tensor, columns_N: Tensor) -> Tensor:
    """`diffusion_loss` with chosen positions instead of a boolean mask, by which meta cannot index."""
    logits_NV = model(input_ids=token_ids_BT, attention_mask=mask, at_BT=(rows_N, columns_N)).logits
    losses_N = nn.functional.cross_entropy(logits_NV.float(), token_ids_BT[rows_N, columns_N], reduction="none")
    return (losses_N * torch.ones_like(losses_N)).sum()


def _attention(autocast: Bf16Autocast | None):
    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
        if autocast is not None:
            q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        if mask is None and autocast is not None:
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=kwargs["scaling"])[0]
        else:
            if module.num_key_value_groups > 1:  # transformers repeats keys and values for each query head
                groups = module.num_key_value_groups
                k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape) for x in (k, v))
            bias = None
            if mask is not None:
                bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)
                bias = bias.expand(-1, q.shape[1], -1, -1)
            out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=kwargs["scaling"])[
                0
            ]
        return out.transpose(1, 2).contiguous(), None

    return attention
