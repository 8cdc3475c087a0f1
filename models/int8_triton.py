"""The int8 product of few rows as a Triton kernel: every int8 of the weight is read once, from the plain layout.

Letters as in `models.int8_linear`. A program makes a [BLOCK_M, BLOCK_N] tile: int8 values are widened in registers to
the dtype of the activations, multiplied on the tensor cores and summed in float32. A few rows make too few tiles to
fill a GPU; then K is split among `num_splits` programs a tile, whose float32 sums a second kernel adds in a fixed
order: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimization.gpu import num_multiprocessors

BLOCK_N, BLOCK_K = 64, 128
NUM_WARPS, NUM_STAGES = 4, 4
_MAX_SPLITS = 16
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_BLOCKS_PER_SPLIT = 4


def few_rows_product(
    x_MK: Tensor, q: Tensor, scb: Tensor, bias: Tensor | None, num_splits: int | None = None
) -> Tensor:
    """x @ (q * scb / 127)^T + bias, [M, N] in the dtype of x; `num_splits` of K, chosen for the GPU where None."""
    num_rows, width = x_MK.shape
    num_outputs = len(q)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    y_MN = x_MK.new_empty(num_rows, num_outputs)
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    tiles = (triton.cdiv(num_outputs, BLOCK_N), triton.cdiv(num_rows, block_m))
    if num_splits is None:
        num_splits = splits_of_k(tiles[0] * tiles[1], width, num_multiprocessors(x_MK.device))
    split_width = triton.cdiv(triton.cdiv(width, num_splits), BLOCK_K) * BLOCK_K
    sums = y_MN if num_splits == 1 else y_MN.new_empty(num_splits, num_rows, num_outputs, dtype=torch.float32)
    bias_or_any = scb if bias is None else bias
    sizes = (num_rows, num_outputs, width)
    _tile_product[(*tiles, num_splits)](
        *(x_MK, q, scb, bias_or_any, sums, *sizes, x_MK.stride(0), q.stride(0), split_width),
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        NUM_SPLITS=num_splits,
        HAS_BIAS=bias is not None,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if num_splits > 1:
        _sum_of_splits[(triton.cdiv(num_outputs, 256), num_rows)](
            *(sums, scb, bias_or_any, y_MN, num_rows, num_outputs),
            BLOCK_N=256,
            NUM_SPLITS=num_splits,
            HAS_BIAS=bias is not None,
        )
    return y_MN


def splits_of_k(num_tiles: int, width: int, num_processors: int) -> int:
    """The power of two that gives every processor two programs, of four blocks of K at least."""
    num_splits = 1
    while (
        num_splits < _MAX_SPLITS
        and num_tiles * num_splits < _PROGRAMS_PER_PROCESSOR * num_processors
        and width >= 2 * num_splits * _LEAST_BLOCKS_PER_SPLIT * BLOCK_K
    ):
        num_splits *= 2
    return num_splits


@triton.jit
def _tile_product(
    x_ptr,
    q_ptr,
    scb_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    q_stride,
    split_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One tile, or one split's share of it in float32 and unscaled."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = split * split_width
    end = tl.minimum(first + split_width, K)
    k = first + tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :]
    q_tile = q_ptr + n[None, :].to(tl.int64) * q_stride + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, split_width, BLOCK_K):
        inside = k + done < end
        x = tl.load(x_tile + done, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        q = tl.load(q_tile + done, mask=inside[:, None] & (n < N)[None, :], other=0)
        sums = tl.dot(x, q.to(x.dtype), acc=sums)
    is_output = (m < M)[:, None] & (n < N)[None, :]
    if NUM_SPLITS == 1:
        sums *= (tl.load(scb_ptr + n, mask=n < N, other=0.0) * (1.0 / 127.0))[None, :]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], sums.to(y_ptr.dtype.element_ty), mask=is_output)
    else:
        tl.store(y_ptr + (split * M + m[:, None]).to(tl.int64) * N + n[None, :], sums, mask=is_output)


@triton.jit
def _sum_of_splits(
    sums_ptr,
    scb_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add the splits of one row, scale, add the bias."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1)
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in range(NUM_SPLITS):
        y += tl.load(sums_ptr + (split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    y *= tl.load(scb_ptr + n, mask=n < N, other=0.0) * (1.0 / 127.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
