"""The product with int8 weights in their plain layout: right on every way that it can take, one node to a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.int8_linear import CUDA_FEW_ROWS_UNMEASURED, int8_linear, widened_product

ROOT = Path(__file__).parents[1]
RAGGED = [(1, 70, 130), (3, 64, 256), (8, 33, 96), (9, 200, 384), (40, 129, 1000)]


def weight(num_outputs, width, device="cpu"):
    """int8 rows that begin in the midst of a larger tensor, as q of a fused q/k/v does, and their scales."""
    fused = torch.randint(-127, 128, (num_outputs + 32, width), dtype=torch.int8)
    scb = torch.rand(num_outputs + 32) + 0.1
    return fused.to(device)[16 : 16 + num_outputs], scb.to(device)[16 : 16 + num_outputs]


def error(y, x, q, scb, bias):
    expected = x.double() @ (q.double() * scb.double()[:, None] / 127).T + (0 if bias is None else bias.double())
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("num_rows", "num_outputs", "width"), RAGGED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)])
def test_the_product_is_right_for_few_and_many_rows(num_rows, num_outputs, width, dtype, most):
    torch.manual_seed(0)
    q, scb = weight(num_outputs, width)
    x = torch.randn(2, num_rows, width).to(dtype)[1:]
    for bias in (None, torch.randn(num_outputs).to(dtype)):
        y = int8_linear(x, q, scb, bias)
        assert y.shape == (1, num_rows, num_outputs) and y.dtype == dtype
        assert error(y[0], x[0], q, scb, bias) < most


def test_scales_are_not_rounded_to_16_bits_for_few_rows():
    """One scale that bfloat16 would move by 0.2 %, on a sum that it holds exactly."""
    q, scb = torch.ones(64, 64, dtype=torch.int8), torch.full((64,), 127 * 1.0019)
    y = int8_linear(torch.full((1, 64), 16.0).bfloat16(), q, scb, torch.full((64,), -1024.0).bfloat16())
    assert y.float().sub(1024 * 0.0019).abs().max() < 0.01


def test_many_rows_get_the_product_with_the_dequantised_weight():
    q, scb = weight(300, 96)
    x, bias = torch.randn(40, 96).bfloat16(), torch.randn(300).bfloat16()
    dequantised = (q * (scb * (1.0 / 127.0))[:, None]).bfloat16()
    assert torch.equal(int8_linear(x, q, scb, bias), torch.nn.functional.linear(x, dequantised, bias))


@pytest.mark.parametrize("num_rows", [1, 40])
def test_float16_does_not_run_over_before_the_scale(num_rows):
    """Sums of 127 x 1000 x 64, which are 40 once they are scaled."""
    q, scb = torch.full((64, 64), 127, dtype=torch.int8), torch.full((64,), 40 / 64000.0)
    y = int8_linear(torch.full((num_rows, 64), 1000.0).half(), q, scb)
    assert y.float().sub(40.0).abs().max() < 0.1


def test_chunks_of_widened_rows_do_not_change_the_product():
    q, scb = weight(300, 64)
    x, bias = torch.randn(5, 64).bfloat16(), torch.randn(300).bfloat16()
    whole = widened_product(x, q, scb, bias, chunk_bytes=2**30)
    for rows_at_once in (64, 65, 100, 299):
        assert torch.equal(widened_product(x, q, scb, bias, chunk_bytes=rows_at_once * 64 * 2), whole)


def test_a_compiler_sees_one_op_whatever_the_number_of_rows():
    """vLLM compiles once with a symbolic number of rows and drops the guards."""
    q, scb = weight(96, 64)
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x):
        return torch.relu(int8_linear(x * 2, q, scb))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in (2, 8, 9, 64, 300):
        x = torch.randn(num_rows, 64).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1
    torch.library.opcheck(torch.ops.rlt.int8_linear.default, (torch.randn(5, 64).bfloat16(), q, scb, None))


_INTERPRETED = """
import itertools, torch
from models.int8_triton import few_rows_product
from tests.test_int8_linear import RAGGED, error, weight

torch.manual_seed(0)
for (num_rows, num_outputs, width), num_splits in itertools.product(RAGGED, (1, 2, 4)):
    q, scb = weight(num_outputs, width)
    for dtype, most in ((torch.float16, 1e-3), (torch.float32, 1e-5)):
        x, bias = torch.randn(num_rows, width).to(dtype), torch.randn(num_outputs).to(dtype)
        for given in (None, bias):
            assert error(few_rows_product(x, q, scb, given, num_splits), x, q, scb, given) < most
        every_other = torch.randn(num_rows, 2 * width).to(dtype)[:, ::2]
        assert error(few_rows_product(every_other, q, scb, None, num_splits), every_other, q, scb, None) < most
print("right")
"""

_COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models import int8_triton as kernel

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KB that a program may have, by compute capability
for capability, block_m, num_splits in [(80, 16, 1), (86, 32, 4), (86, 64, 1), (89, 64, 4), (90, 64, 1), (90, 16, 16)]:
    sums = "*bf16" if num_splits == 1 else "*fp32"
    pointers = dict(x_ptr="*bf16", q_ptr="*i8", scb_ptr="*fp32", bias_ptr="*bf16", y_ptr=sums)
    constants = dict(BLOCK_M=block_m, BLOCK_N=kernel.BLOCK_N, BLOCK_K=kernel.BLOCK_K)
    constants |= dict(NUM_SPLITS=num_splits, HAS_BIAS=True)
    names = kernel._tile_product.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in {*constants, "M"}}
    compiled = compile(
        ASTSource(kernel._tile_product, signature, constants, divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.NUM_WARPS, "num_stages": kernel.NUM_STAGES},
    )
    code = compiled.asm["ptx"]
    assert "wgmma.mma" in code or "mma.sync" in code, "no tensor cores"
    assert "cp.async" in code and compiled.asm["cubin"]
    print(f"sm_{capability}, {block_m} rows, {num_splits} splits: {compiled.metadata.shared / 1024:.0f} KB")
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
print("right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [_INTERPRETED, _COMPILED], ids=["interpreted", "compiled for sm_80 to sm_90"])
def test_the_kernel_for_few_rows_without_a_gpu(script):
    """In Triton's interpreter against float64; and as machine code, which takes no GPU to make."""
    pytest.importorskip("triton")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if script is _INTERPRETED else {})
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 17, CUDA_FEW_ROWS_UNMEASURED, CUDA_FEW_ROWS_UNMEASURED + 1, 700])
@pytest.mark.parametrize(("num_outputs", "width"), [(4608, 3584), (129, 1008), (3584, 18944)])
def test_the_product_is_right_on_a_gpu(num_rows, num_outputs, width):
    q, scb = weight(num_outputs, width, "cuda")
    x, bias = torch.randn(num_rows, width).bfloat16().cuda(), torch.randn(num_outputs).bfloat16().cuda()
    for given in (None, bias):
        assert error(int8_linear(x, q, scb, given), x, q, scb, given) < 4e-3
        assert torch.equal(int8_linear(x, q, scb, given), int8_linear(x, q, scb, given))
