"""The 16-bit product of LLM.int8 weights (`model_args.int8_matmul: dequantize`).

    y = x @ w16^T + bias,  dx = dy @ w16,  w16 = q * SCB / 127 rounded to the activations' dtype

for a frozen weight q int8 [N, K] with its float32 row scales SCB [N]. The storage is bitsandbytes' own; what changes is
the product: no activation is rounded to int8, no outlier columns are looked for (on a GPU a synchronisation with the
host for each linear), and the function is the generator's, which multiplies the same values with 16-bit activations.
A linear widens its matrix for the length of one product and keeps nothing of it, nor of its input, for its backward.

On a CPU it is what bitsandbytes itself computes in training (`MatMul8bitFp`), bit for bit; the gradient is that of all
its ways. The scale goes into the matrix and not onto the product, which would leave float16's range.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional

from optimization.record import AppliedOptimization, Change, Obstacle, nothing


class Int8LinearIn16Bits(bnb.nn.Linear8bitLt):
    """A bitsandbytes linear whose product is `DequantizedProduct`; holds, saves and moves its weight as before."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:  # until the first forward the weight holds what then is the state's
            self.init_8bit_state()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return DequantizedProduct.apply(x, self.weight.data, self.state.SCB, bias)


class DequantizedProduct(torch.autograd.Function):
    """x [..., K] -> [..., N] in x's dtype, and the gradient of x. Weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q_NK: Tensor, scb_N: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(q_NK, scb_N)  # which live anyway
        ctx.dtype = x.dtype
        return functional.linear(x, _widened(q_NK, scb_N, x.dtype), bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dy,) = grads
        q_NK, scb_N = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return dy.to(ctx.dtype) @ _widened(q_NK, scb_N, ctx.dtype), None, None, None


def _widened(q_NK: Tensor, scb_N: Tensor, dtype: torch.dtype) -> Tensor:
    return widen(q_NK, scb_N, out_NK=torch.empty(q_NK.shape, dtype=dtype, device=q_NK.device))


def widen(q_NK: Tensor, scb_N: Tensor, *, out_NK: Tensor) -> Tensor:
    """q * SCB / 127 written to `out_NK`, multiplied in float32 and rounded once; no other tensor of that size is made.

    Trainer and generator both call this where they widen: their weights are the same bits.
    """
    return torch.mul(q_NK, (scb_N * (1.0 / 127.0))[:, None], out=out_NK)


def multiply_in_16_bits(model: nn.Module) -> AppliedOptimization | Obstacle:
    """Give every LLM.int8 linear of a loaded model its 16-bit product; undo gives bitsandbytes' back."""
    linears = [module for module in model.modules() if type(module) is bnb.nn.Linear8bitLt]
    if not linears:
        return nothing("16-bit product", f"{type(model).__name__} has no LLM.int8 linear")
    for linear in linears:
        linear.__class__ = Int8LinearIn16Bits

    def undo() -> None:
        for linear in linears:
            linear.__class__ = bnb.nn.Linear8bitLt

    return AppliedOptimization(
        name="16-bit product",
        changes=(Change(what=f"product of {len(linears)} int8 linears", before="llm_int8", after="dequantize"),),
        effect="the generator's function; less memory beside the weights (predicted); time on a GPU not measured",
        undo_steps=[undo],
    )
