"""Product of 16-bit activations with an int8 weight as bitsandbytes keeps it: y = x @ (q * scb / 127)^T.

Letters: M rows of activations, N outputs, K inputs. q [N, K] int8 and scb [N] float32 are read where they lie; no other
layout and no widened copy of the whole weight is ever made.

`rlt::int8_linear` is one custom op: the way that it takes depends on M, which vLLM compiles as a symbol. A Python
branch outside the op would be taken once, for all M.

| device | few rows | many rows |
|---|---|---|
| CUDA | Triton kernel: each int8 is read once (`models/int8_triton.py`) | rows of q widened in chunks, cuBLAS |
| CPU | `torch._weight_int8pack_mm` | rows of q widened in chunks that stay in the cache |

|q| <= 127 is exact in bfloat16 and float16. Scales are applied to the sums, in float32: they are never rounded to 16
bits.
"""

import functools

import torch
from torch import Tensor

_CPU_FEW_ROWS = 8
_CPU_WIDTH_MULTIPLE = 32  # `_weight_int8pack_mm` takes K in vectors and reads beyond the end of rows of another width
_CPU_CHUNK_BYTES = 4 * 1024**2
_CUDA_CHUNK_BYTES = 64 * 1024**2
CUDA_FEW_ROWS: dict[tuple[int, int], int] = {}
"""Up to how many rows the Triton kernel serves, by compute capability: what `benchmarks/int8_linear.py` printed on such
a card. Others take `CUDA_FEW_ROWS_UNMEASURED`."""
CUDA_FEW_ROWS_UNMEASURED = 64


def int8_linear(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] in the dtype of x [..., K]. No gradient."""
    return torch.ops.rlt.int8_linear(x, q, scb, bias)


def widened_product(x_MK: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None, chunk_bytes: int) -> Tensor:
    """[M, N] in the dtype of x; at most `chunk_bytes` (or 64 rows) of q are widened at once."""
    y_MN = x_MK.new_empty(len(x_MK), len(q))
    num_rows = min(len(q), max(64, chunk_bytes // (q.shape[1] * x_MK.element_size())))
    widened = x_MK.new_empty(num_rows, q.shape[1])
    for start in range(0, len(q), num_rows):
        rows = slice(start, min(start + num_rows, len(q)))
        y_chunk = y_MN[:, rows]
        torch.mm(x_MK, widened[: rows.stop - start].copy_(q[rows]).t(), out=y_chunk)
        _scale_(y_chunk, scb[rows], None if bias is None else bias[rows])
    return y_MN


def _scale_(sums_MN: Tensor, scb: Tensor, bias: Tensor | None) -> None:
    """In float32 within the kernel, without a float32 copy of the sums on a GPU."""
    scales = scb * (1.0 / 127.0)
    if bias is None:
        sums_MN.mul_(scales)
    else:
        torch.addcmul(bias, sums_MN, scales, out=sums_MN)


def _on_cpu(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    packs = x.dtype != torch.float32 and q.shape[1] % _CPU_WIDTH_MULTIPLE == 0  # in float32 it is the slower one
    if packs and len(x_MK) <= _CPU_FEW_ROWS:
        y_MN = torch._weight_int8pack_mm(x_MK.contiguous(), q, x.new_ones(len(q)))
        _scale_(y_MN, scb, bias)
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
    return CUDA_FEW_ROWS.get(torch.cuda.get_device_capability(device), CUDA_FEW_ROWS_UNMEASURED)


def _shape_only(x: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


_library = torch.library.Library("rlt", "FRAGMENT")  # the op lasts as long as this object
_library.define("int8_linear(Tensor x, Tensor q, Tensor scb, Tensor? bias) -> Tensor")
_library.impl("int8_linear", _on_cpu, "CPU")
_library.impl("int8_linear", _on_cuda, "CUDA")
_library.impl("int8_linear", _shape_only, "Meta")
