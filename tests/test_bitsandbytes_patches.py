"""Patches of bitsandbytes: 4-bit weights on a CPU are dequantised right, and each patch is still needed.

Inputs of int8 linears: `test_int8_checkpointing.py`; gradients after an evaluation: `test_evaluation_mode.py`.
"""

import gc
import re
from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch

from optimization import bitsandbytes_patches
from optimization.bitsandbytes_patches import fix_cpu_dequantization, stays_in_training_mode


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
    linear = torch.nn.Linear(96, 32, bias=False)
    linear.weight.data *= torch.linspace(0.1, 3, 32)[:, None]
    layer = bnb.nn.Linear4bit(96, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").train()
    x = torch.randn(8, 96)
    expected = linear(x)
    assert (layer(x) - expected).norm() / expected.norm() < 0.15


def test_bitsandbytes_still_dequantises_unaligned_rows_wrongly():
    """If this fails, `fix_cpu_dequantization` may go."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 8)[:, None]

    def error():
        packed, state = bnb_functional.quantize_4bit(weight, quant_type="nf4")
        return (bnb_functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()

    bitsandbytes_patches._library.clear()
    gc.collect()
    assert error() > 0.3
    fix_cpu_dequantization()
    assert error() < 0.12


def test_bitsandbytes_still_takes_another_kernel_in_evaluation_mode():
    """If this fails on every CPU (4 bits: AVX512-BF16 ones re-pack the weights), `stays_in_training_mode` may go."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    assert stays_in_training_mode(layer) and not stays_in_training_mode(torch.nn.Linear(2, 2))
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert not torch.equal(layer.train()(x), layer.eval()(x))


def test_bitsandbytes_still_has_a_layout_for_some_shapes_only():
    """If this fails, `avoid_cpu_layout` may go."""
    packed, state = bnb_functional.quantize_4bit(torch.randn(33, 64), quant_type="nf4")
    with pytest.raises(AssertionError, match="divisible"):
        bnb_functional._convert_weight_packed_for_cpu(packed, state)
    layer = bnb.nn.Linear4bit(64, 33)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    bitsandbytes_patches.avoid_cpu_layout(layer)
    assert not layer.support_avx512bf16_for_cpu


def test_the_page_of_patches_names_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", bitsandbytes_patches.__doc__)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) == 4 and all(f"def {name}(" in tests for name in named)
