"""Product of 16-bit activations with an int8 weight as bitsandbytes keeps it: y = x @ (q * scb / 127)^T.

Letters: M rows of activations, N outputs, K inputs. q [N, K] int8 and scb [N] float32 are read where they lie; no other
layout and no widened copy of the whole weight is ever made.

`rlt::int8_linear` is one custom op: the way that it takes depends on M, which vLLM compiles as a symbol. A Python
branch outside the op would be taken once, for all M.

| device | few rows | many rows |
|---|---|---|
| CUDA | Triton kernel: each int8 is read once (`models/int8_triton.py`) | weight widened in chunks of rows, cuBLAS |
| CPU, bfloat16 | `torch._weight_int8pack_mm` | weight widened in chunks that stay in the cache |

|q| <= 127 is exact in 16 bits. Of few rows the scale goes onto the sums, in float32. Of many it goes into the widened
weight, which is rounded to the dtype of x: the product that an export of the dequantised values gives.
"""

import functools

import torch
from torch import Tensor

from optimization.gpu import compute_capability
from optimization.int8_matmul import widen

_CPU_FEW_ROWS = 8
_CPU_WIDTH_MULTIPLE = 32  # `_weight_int8pack_mm` takes K in vectors and reads beyond the end of rows of another width
_CPU_CHUNK_BYTES = 1024**2
_CUDA_CHUNK_BYTES = 64 * 1024**2
CUDA_FEW_ROWS: dict[tuple[int, int], int] = {}
"""Up to how many rows the Triton kernel serves, by compute capability: what
`benchmarks/shared_base.py --part products` printed on such a GPU. Others take `CUDA_FEW_ROWS_UNMEASURED`."""
CUDA_FEW_ROWS_UNMEASURED = 64


def int8_linear(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] in the dtype of x [..., K]. No gradient."""
    return torch.ops.rlt.int8_linear(x, q, scb, bias)


def widened_product(x_MK: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None, chunk_bytes: int) -> Tensor:
    """[M, N] in the dtype of x; at most `chunk_bytes` (or 64 rows) of the weight are widened at once."""
    y_MN = x_MK.new_empty(len(x_MK), len(q))
    num_rows = min(len(q), max(64, chunk_bytes // (q.shape[1] * x_MK.element_size())))
    buffer = x_MK.new_empty(num_rows, q.shape[1])
    for start in range(0, len(q), num_rows):
        rows = slice(start, min(start + num_rows, len(q)))
        weight = widen(q[rows], scb[rows], out_NK=buffer[: rows.stop - start])
        if bias is None:
            torch.mm(x_MK, weight.t(), out=y_MN[:, rows])
        else:
            torch.addmm(bias[rows], x_MK, weight.t(), out=y_MN[:, rows])
    return y_MN


def _on_cpu(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    # float32 is slow there, float16 has no room for sums without their scales.
    packs = x.dtype == torch.bfloat16 and q.shape[1] % _CPU_WIDTH_MULTIPLE == 0
    if packs and len(x_MK) <= _CPU_FEW_ROWS:
        sums_MN = torch._weight_int8pack_mm(x_MK.contiguous(), q, x.new_ones(len(q)))
        y_MN = sums_MN * (scb * (1.0 / 127.0))
        y_MN = (y_MN if bias is None else y_MN + bias).to(x.dtype)
    else:
        y_MN = widened_product(x_MK, q, scb, bias, _CPU_CHUNK_BYTES)
    return y_MN.view(*x.shape[:-1], len(q))


def _on_cuda(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    if len(x_MK) <= _few_rows_on_cuda(x.device):
        from models.int8_triton import few_rows_product

        y_MN = few_rows_product(x_MK, q, scb, bias)
    else:
        y_MN = widened_product(x_MK, q, scb, bias, _CUDA_CHUNK_BYTES)
    return y_MN.view(*x.shape[:-1], len(q))


@functools.cache
def _few_rows_on_cuda(device: torch.device) -> int:
    return CUDA_FEW_ROWS.get(compute_capability(device), CUDA_FEW_ROWS_UNMEASURED)


def _shape_only(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


_library = torch.library.Library("rlt", "FRAGMENT")  # the op lasts as long as this object
_library.define("int8_linear(Tensor x, Tensor q, Tensor scb, Tensor? bias) -> Tensor")
_library.impl("int8_linear", _on_cpu, "CPU")
_library.impl("int8_linear", _on_cuda, "CUDA")
_library.impl("int8_linear", _shape_only, "Meta")
