"""Teachers with random weights for memory tests: on the meta device to be traced, on a real one to be measured."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimization.bitsandbytes_patches import release_int8_activations
from optimization.fp8_optim import quantise_to_fp8
from optimization.int8_matmul import multiply_in_16_bits
from planner.settings import PlanSettings


def build_model(settings: PlanSettings, device: str = "meta") -> nn.Module:
    """The teacher with random weights: quantised base, LoRA adapter, checkpointing as the settings say.

    In fp8 it is a frozen model that is scored, without an adapter.
    """
    shape = settings.teacher
    with torch.device(device):
        model = random_causal_lm(settings, torch.bfloat16)
        model.requires_grad_(False)
        if settings.precision == "fp8":
            quantise_to_fp8(model)
            return model
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear) and settings.precision != "bf16":
                        quantise = _quantised_on_meta if device == "meta" else _quantised
                        setattr(parent, name, quantise(linear, settings))
        if settings.precision == "int8" and settings.int8_matmul == "dequantize":
            multiply_in_16_bits(model)
        model.is_loaded_in_8bit = settings.precision == "int8"
        model.is_loaded_in_4bit = settings.precision == "nf4"
        targets = list(settings.lora_targets or shape.linears)
        peft_model = get_peft_model(model, LoraConfig(r=settings.lora_r, target_modules=targets, task_type="CAUSAL_LM"))
    dtype = torch.float32 if settings.adapter_bytes_per_param == 4 else torch.bfloat16
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    peft_model.train()
    if settings.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return peft_model


def random_causal_lm(settings: PlanSettings, dtype: torch.dtype) -> Any:
    """transformers' own architecture of the shape, on the current device."""
    shape = settings.teacher
    model_type = "qwen3" if shape.qk_norm else "qwen2" if shape.attention_bias else "llama"
    config = AutoConfig.for_model(
        model_type,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=shape.max_positions,
        layer_types=["full_attention"] * shape.num_layers,
    )
    implementation = "eager" if settings.attention == "eager" else "sdpa"
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)


def _quantised(linear: nn.Linear, settings: PlanSettings) -> nn.Module:
    """bitsandbytes quantises while a weight moves from the CPU to its device."""
    n, k = linear.weight.shape
    device, weight, has_bias = linear.weight.device, linear.weight.data.cpu(), linear.bias is not None
    quantised: Any
    if settings.precision == "int8":
        quantised = bnb.nn.Linear8bitLt(k, n, has_bias, has_fp16_weights=False, threshold=settings.int8_threshold)
        quantised.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        quantised = bnb.nn.Linear4bit(k, n, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        quantised.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=settings.double_quant
        ).to(device)
    quantised.bias = linear.bias
    return quantised


def _quantised_on_meta(linear: nn.Linear, settings: PlanSettings) -> nn.Module:
    """The layer with everything that quantising would have allocated."""
    n, k = linear.weight.shape
    has_bias = linear.bias is not None
    quantised: Any
    if settings.precision == "int8":
        quantised = bnb.nn.Linear8bitLt(k, n, has_bias, has_fp16_weights=False, threshold=settings.int8_threshold)
        values = torch.empty(n, k, dtype=torch.int8)
        scales = torch.empty(n, dtype=torch.float32)
        quantised.weight = bnb.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
    else:
        quantised = bnb.nn.Linear4bit(k, n, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        num_blocks = n * k // 64
        outer = QuantState(
            absmax=torch.empty(num_blocks // 256 + 1), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
        state = QuantState(
            absmax=torch.empty(num_blocks, dtype=torch.uint8) if settings.double_quant else torch.empty(num_blocks),
            shape=torch.Size((n, k)),
            code=torch.empty(16),
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=torch.empty(()) if settings.double_quant else None,
            state2=outer if settings.double_quant else None,
        )
        packed = torch.empty(n * k // 2, 1, dtype=torch.uint8)
        quantised.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    if has_bias:
        quantised.bias = nn.Parameter(torch.empty(n, dtype=torch.bfloat16), requires_grad=False)
    return quantised


@contextlib.contextmanager
def int8_inputs(*, released: bool) -> Iterator[None]:
    """Our checkpointing fix on, or bitsandbytes' own forward where the fix is off."""
    release_int8_activations()
    function = bnb.autograd._functions.MatMul8bitLt
    if released:
        yield
    else:
        with mock.patch.object(function, "forward", staticmethod(function.forward.__wrapped__)):
            yield
