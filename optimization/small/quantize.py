"""Quantise the linear layers of a trained model in place; embeddings, norms and the head stay as they are.

Letters: N out features, K in features.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import UserError
from optimization.bitsandbytes_patches import avoid_cpu_layout, fix_cpu_dequantization

_OUTLIER_THRESHOLD = 6.0  # LLM.int8: activation columns with a larger magnitude are multiplied in 16 bits
_NF4_BLOCK = 64
# NF4 with double quantisation in bitsandbytes: a byte per block, a float32 for 256 of those bytes, two tables.
_NF4_BLOCKS_PER_SCALE = 256
_NF4_TABLE_BYTES = 4 * (16 + 256)


class Int8WeightOnlyLinear(nn.Module):
    """`y = x @ (values * scale)^T + bias` with int8 values [N, K] and one float32 scale per output row [N].

    scale = max |w| / 127 of the row (absmax, symmetric), as in LLM.int8, but activations are not quantised.
    """

    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        values = (weight / scales[:, None]).round().to(torch.int8)
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.values * self.scales[:, None]).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class Quantize:
    """`dynamic`: weights and activations in 8 bits; `static`: weights only. Both change the model and return it."""

    @staticmethod
    def dynamic(model: nn.Module) -> nn.Module:
        """LLM.int8 (bitsandbytes): int8 weights; activations are quantised per row in every forward, outliers apart.

        For inference, or as the frozen base of an adapter. In train mode on a CPU bitsandbytes leaves activations as
        they are.

        Raises:
            UserError: the model has no linear layers that could be quantised.
        """
        return _replace_linears(model, _llm_int8)

    @staticmethod
    def static(model: nn.Module, bits: Literal[8, 4]) -> nn.Module:
        """Weights only, activations as they are: 8 bits per output row, or 4 bits NF4 with double quantisation.

        NF4 (bitsandbytes) has blocks of 64 weights; 4.13 bits per weight, see docs/quantisation.md.

        Raises:
            UserError: other widths, or nothing to quantise.
        """
        if bits == 8:
            return _replace_linears(model, Int8WeightOnlyLinear)
        if bits == 4:
            return _replace_linears(model, _nf4)
        raise _unknown_width(bits)


def _unknown_width(bits: int) -> UserError:
    return UserError(f"static quantisation to {bits} bits", expected="bits=8 or bits=4", remedy="choose one of them")


def quantised_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored, quantisation statistics included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) + sum(tensor.nbytes for tensor in _statistics(model))


def bytes_when_quantised(model: nn.Module, bits: int) -> int:
    """`quantised_bytes` after `Quantize.static(model, bits)`, which is not done; the meta device will do.

    Raises:
        UserError: other widths than 8 and 4, or nothing to quantise.
    """
    if bits not in _BYTES_OF_LINEAR:
        raise _unknown_width(bits)
    linears = [linear for _, linear in _linears(model)]
    before = sum(linear.weight.nbytes for linear in linears)
    after = sum(_BYTES_OF_LINEAR[bits](linear.out_features, linear.in_features) for linear in linears)
    return quantised_bytes(model) - before + after


def _int8_bytes(num_out: int, num_in: int) -> int:
    return num_out * num_in + 4 * num_out


def _nf4_bytes(num_out: int, num_in: int) -> int:
    num_blocks = -(-num_out * num_in // _NF4_BLOCK)
    scales = num_blocks + 4 * -(-num_blocks // _NF4_BLOCKS_PER_SCALE)
    return (num_out * num_in + 1) // 2 + scales + _NF4_TABLE_BYTES


_BYTES_OF_LINEAR: dict[int, Callable[[int, int], int]] = {8: _int8_bytes, 4: _nf4_bytes}


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state: Any = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.state2.absmax, state.state2.code)
        scales = getattr(weight, "SCB", None)
        if scales is None:  # bitsandbytes moves them to the layer's state in the first forward
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None:
            yield scales


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those that are quantised: all but the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    if not linears:
        raise UserError(
            f"{type(model).__name__} without linear layers to quantise",
            expected="a model in float32 or 16 bits",
            remedy="load it without quantisation first",
        )
    return linears


def _replace_linears(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, linear in _linears(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, convert(linear).train(linear.training))
    return model


def _llm_int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    has_bias = linear.bias is not None
    int8 = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=_OUTLIER_THRESHOLD
    )
    int8.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    int8.bias = linear.bias
    return int8.to(linear.weight.device)  # quantises


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    fix_cpu_dequantization()
    has_bias = linear.bias is not None
    nf4 = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        has_bias,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    nf4.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    nf4.bias = linear.bias
    avoid_cpu_layout(nf4)
    return nf4.to(linear.weight.device)  # quantises
