"""The planner's judge: one LoRA training step of the real architecture on the meta device, every storage tracked.

Real: transformers' model code and gradient checkpointing, peft's LoRA layers, bitsandbytes' layers and autograd
functions, the head of rollout/logprobs.py, autograd. Transcribed op by op, because they run on a GPU only: the bodies
of bitsandbytes' CUDA ops and the workspace of flash attention's backward. Emulated: bf16 autocast, unknown to meta.

Letters: B rows, T tokens of a row, C scored tokens of a row, H hidden size, N, K out and in features of a linear.
"""

import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.shapes import ModelShape
from planner.teacher import TeacherSettings
from rollout.logprobs import DEFAULT_LOGIT_CHUNK_LEN as CHUNK_LEN
from rollout.logprobs import _HeadLogProbs
from tests.helpers.step_models import build_model, int8_inputs

_linear = nn.functional.linear
_BLOCK_BYTES = 512
"""The CUDA caching allocator rounds every allocation up to this."""


class MemoryTracker(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak, while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._alive: dict[int, weakref.ref] = {}

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES

        def freed(_: Any) -> None:
            del self._alive[key]
            self.live_bytes -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        transcription = _TRANSCRIBED.get(func.name())
        if transcription is not None:
            with self:
                return transcription(func, *args, **(kwargs or {}))
        workspace = None
        if func.name() == "aten::_scaled_dot_product_flash_attention_backward":
            with self:
                workspace = _flash_backward_workspace(query=args[1], key=args[2])
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        del workspace
        return out


# bitsandbytes 0.50.2, backends/cuda/ops.py and backends/default/ops.py: the allocations of each op, no outlier columns


def _int8_vectorwise_quant(_: Any, a: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    row_stats = a.new_empty(a.numel() // a.shape[-1], dtype=torch.float32)
    out_row = torch.empty_like(a, dtype=torch.int8)
    if threshold == 0.0:
        return out_row, row_stats, None
    outliers = a.abs() >= threshold  # noqa: F841  alive until the op returns
    return out_row, row_stats, a.new_empty(0, dtype=torch.int64)


def _int8_scaled_mm(
    _: Any, a: Tensor, b: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None, dtype: Any = None
) -> Tensor:
    accumulated = a.new_empty(*a.shape[:-1], b.shape[0], dtype=torch.int32)
    out = torch.empty_like(accumulated, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        out.add_(bias)
    return out.to(dtype or torch.float16)


def _int8_mixed_scaled_mm(
    _: Any,
    a: Tensor,
    ca: Tensor,
    cb: Tensor,
    sca: Tensor,
    scb: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sub_a = a.new_empty(0)
    return _int8_scaled_mm(None, ca, cb, sca, scb, bias, a.dtype), sub_a


def _dequantize_4bit(_: Any, a: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: Any, dtype: Any) -> Tensor:
    return a.new_empty(shape, dtype=dtype)


def _dequantize_blockwise(_: Any, a: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: Any) -> Tensor:
    return torch.empty_like(a, dtype=dtype)


def _gemm_4bit(
    _: Any,
    a: Tensor,
    b: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Above a few dozen rows the CUDA op dequantises the whole weight and calls linear."""
    if absmax_8bit is not None:
        absmax = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax.add_(absmax_offset)
    weight = a.new_empty(shape)
    return nn.functional.linear(a, weight, bias)


def _flash_backward_workspace(query: Tensor, key: Tensor) -> list[Tensor]:
    """FlashAttention 2 adds up dq in float32 and writes dk and dv once per query head."""
    per_query_head = [torch.empty_like(query) for _ in range(2)] if key.shape[1] != query.shape[1] else []
    return [torch.empty_like(query, dtype=torch.float32), *per_query_head]


_TRANSCRIBED: dict[str, Callable[..., Any]] = {
    "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "bitsandbytes::dequantize_4bit": _dequantize_4bit,
    "bitsandbytes::dequantize_blockwise": _dequantize_blockwise,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}


class Bf16Autocast:
    """`torch.autocast(bf16)` for the one op that needs it here: linear casts its float32 operands.

    As in autocast, the 16-bit copy of a float32 parameter is kept until the outermost context ends (`forward_ended`).
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self.keeps_copies = True

    def forward_ended(self) -> None:
        self._copies.clear()
        self.keeps_copies = False

    def _cast(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (self.keeps_copies and tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _linear(self._cast(x), self._cast(weight), bias)


def _flash_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=kwargs["scaling"])[0]
    return out.transpose(1, 2).contiguous(), None


def _masked_sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa with a mask: keys and values repeated per query head, the mask as a bias."""
    groups = module.num_key_value_groups
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape) for x in (k, v))
    bias = (
        torch.zeros_like(mask, dtype=q.dtype)
        .masked_fill_(mask.logical_not(), -torch.inf)
        .expand(-1, q.shape[1], -1, -1)
    )
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=kwargs["scaling"])[0]
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _on_meta(attention: str, autocast: Bf16Autocast) -> Iterator[None]:
    """Autocast as it would be on a GPU, and our stand-in for the attention kernel."""

    def autocast_is_on(device_type: str | None = None) -> bool:
        return device_type in (None, "meta")

    stand_in = {"flash": _flash_attention, "masked_sdpa": _masked_sdpa}.get(attention)
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(torch, "autocast", lambda device_type, enabled=True: contextlib.nullcontext()),
            mock.patch.object(nn.functional, "linear", autocast.linear),
            mock.patch.object(torch, "is_autocast_enabled", autocast_is_on),
            mock.patch.object(torch, "get_autocast_dtype", lambda device_type: torch.bfloat16),
        ):
            stack.enter_context(patch)
        if stand_in is not None:
            stack.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": stand_in}))
        yield


def _state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that lies on the GPU before the step: parameters, buffers, quantisation statistics."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            yield module.weight.SCB
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _optimizer_states(parameter: Tensor) -> list[Tensor]:
    """bitsandbytes' 8-bit Adam: two states of one byte, a float32 scale per 256 values; float32 below 4096 values."""
    count = parameter.numel()
    if count < 4096:
        return [torch.empty(count, device="meta") for _ in range(2)]
    blocks = -(-count // 256)
    values = [torch.empty(count, dtype=torch.uint8, device="meta") for _ in range(2)]
    return values + [torch.empty(blocks, device="meta") for _ in range(2)]


@dataclass(frozen=True)
class Simulated:
    static_bytes: int
    """Base, adapter, gradients and optimizer states."""
    peak_bytes: int


def simulate_training_step(settings: TeacherSettings) -> Simulated:
    """Peak of allocated bytes in one micro-batch's forward and backward, gradients of an earlier one present."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = build_model(settings)
    tracker, autocast = MemoryTracker(), Bf16Autocast()
    for tensor in _state_tensors(model):
        tracker.track(tensor)
    kept = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            kept += [parameter.grad, *_optimizer_states(parameter)]
    for tensor in kept:
        tracker.track(tensor)
    static = tracker.live_bytes
    with int8_inputs(released=settings.int8_inputs_released), _on_meta(settings.attention, autocast), tracker:
        _forward_backward(model, settings, autocast)
    del model, kept
    gc.collect()
    return Simulated(static, tracker.peak_bytes)


def _forward_backward(model: nn.Module, settings: TeacherSettings, autocast: Bf16Autocast) -> None:
    num_rows, row_len, num_scored = settings.micro_batch, settings.row_len, settings.max_completion_len
    causal_lm = model.get_base_model()
    input_ids = torch.empty(num_rows, row_len, dtype=torch.long, device="meta")
    mask = _mask(settings)
    model_module = sys.modules[type(causal_lm.model).__module__]
    hooks: Any = contextlib.nullcontext()
    if settings.checkpointing == "layers_offloaded":
        hooks = torch.autograd.graph.saved_tensors_hooks(_drop_large, _restore)
    # transformers reads values to decide on the mask, which the meta device does not have.
    with hooks, mock.patch.object(model_module, "create_causal_mask", lambda **_: mask):
        hidden_BTH = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state
    # The scored positions are selected by index; the same copy of [B * C, H], without data-dependent shapes.
    scored_NH = hidden_BTH[:, -num_scored - 1 : -1].reshape(-1, hidden_BTH.shape[-1])
    del hidden_BTH
    targets_N = torch.empty(num_rows * num_scored, dtype=torch.long, device="meta")
    if settings.full_logits:
        logits = nn.functional.linear(scored_NH, causal_lm.get_output_embeddings().weight).float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, targets_N.unsqueeze(-1))
        del logits
    else:
        chunks = zip(scored_NH.split(CHUNK_LEN), targets_N.split(CHUNK_LEN), strict=True)
        logprobs = torch.cat(
            [_HeadLogProbs.apply(hidden, causal_lm, target, 0.7, True)[0] for hidden, target in chunks]
        )
    del scored_NH
    autocast.forward_ended()
    logprobs.sum().backward()


def _mask(settings: TeacherSettings) -> Tensor | None:
    if settings.attention == "flash":
        return None
    dtype = torch.bfloat16 if settings.attention == "eager" else torch.bool
    return torch.empty(settings.micro_batch, 1, settings.row_len, settings.row_len, dtype=dtype, device="meta")


def _drop_large(tensor: Tensor) -> Any:
    return (tensor.shape, tensor.dtype) if tensor.ndim == 3 and tensor.dtype == torch.bfloat16 else tensor


def _restore(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1], device="meta")


def simulate_scoring(settings: TeacherSettings, *, adapter: bool = False) -> Simulated:
    """Peak of a forward without gradients through the body (the head runs on small chunks apart)."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = build_model(replace(settings, checkpointing="none"))
    tracker, autocast = MemoryTracker(), Bf16Autocast()
    for tensor in _state_tensors(model):
        tracker.track(tensor)
    static = tracker.live_bytes
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    input_ids = torch.empty(settings.micro_batch, settings.row_len, dtype=torch.long, device="meta")
    mask = _mask(settings)
    adapter_state = (
        model.disable_adapter() if isinstance(model, PeftModel) and not adapter else contextlib.nullcontext()
    )
    model_module = sys.modules[type(causal_lm.model).__module__]
    with _on_meta(settings.attention, autocast), tracker, torch.no_grad(), adapter_state:
        if mask is not None:
            tracker.track(mask)
        with mock.patch.object(model_module, "create_causal_mask", lambda **_: mask):
            causal_lm.model(input_ids=input_ids, use_cache=False)
    return Simulated(static, tracker.peak_bytes)


def layer_count(settings: TeacherSettings, num_layers: int) -> TeacherSettings:
    shape: ModelShape = replace(settings.teacher, num_layers=num_layers)
    return replace(settings, teacher=shape)
