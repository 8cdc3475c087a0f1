"""4-bit weights on the CPU are dequantised right, whatever the shape of the matrix."""

import bitsandbytes.functional as bnb_functional
import pytest
import torch

from optimization.nf4_cpu import fix_cpu_dequantization


@pytest.mark.parametrize("shape", [(64, 64), (96, 96), (64, 160), (2, 96), (96, 200), (3, 128)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_values_are_level_times_block_maximum(shape, double_quant):
    fix_cpu_dequantization()
    torch.manual_seed(0)
    weight = torch.randn(*shape) * torch.rand(shape[0], 1)  # rows of different size show whose scale was used
    packed, state = bnb_functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    absmax = state.absmax
    if double_quant:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    indices = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).long()
    plain = state.code[indices] * absmax.repeat_interleave(state.blocksize)[: indices.numel()]
    assert torch.equal(bnb_functional.dequantize_4bit(packed, state), plain.view(shape))
    error = (plain.view(shape) - weight).norm() / weight.norm()
    assert error < 0.12


def test_matmul_of_an_unaligned_layer_uses_the_right_weight():
    fix_cpu_dequantization()
    torch.manual_seed(0)
    import bitsandbytes as bnb

    linear = torch.nn.Linear(96, 32, bias=False)
    linear.weight.data *= torch.linspace(0.1, 3, 32)[:, None]
    layer = bnb.nn.Linear4bit(96, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").train()
    x = torch.randn(8, 96)
    expected = linear(x)
    assert (layer(x) - expected).norm() / expected.norm() < 0.15
