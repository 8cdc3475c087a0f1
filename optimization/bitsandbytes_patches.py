"""Patches of bitsandbytes: what is wrong in it, what is done instead, and when each patch may go.

Found with 0.50.2, the oldest version that `pyproject.toml` admits. Each has a test that fails once bitsandbytes does
right by itself; that failure is the moment to delete the patch together with its calls.

* `release_int8_activations`, where an 8-bit base is loaded:
  `test_bitsandbytes_still_keeps_the_input_where_the_fix_drops_it`
* `fix_cpu_dequantization`, where 4-bit weights are made or loaded:
  `test_bitsandbytes_still_dequantises_unaligned_rows_wrongly`
* `stays_in_training_mode`, in `models.evaluation`:
  `test_bitsandbytes_still_takes_another_kernel_in_evaluation_mode`
* `avoid_cpu_layout`, where `Quantize` makes a 4-bit linear:
  `test_bitsandbytes_still_has_a_layout_for_some_shapes_only`
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd import _functions
from torch import Tensor, nn

_QUANTISED = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)

# Class -> the ctx attribute that holds the input, and what to put in its place (backward unpacks three from `tensors`).
_RETAINED_INPUT: dict[str, tuple[str, Any]] = {
    "MatMul8bitLt": ("tensors", (None, None, None)),
    "MatMul8bitFp": ("A", None),
}

_DEQUANTIZE_OP = "dequantize_4bit"
_library: list[torch.library.Library] = []

_CPU_LAYOUT_COLUMNS, _CPU_LAYOUT_ROWS = 64, 32


def release_int8_activations() -> None:
    """Activation checkpointing frees the inputs of LLM.int8 linears whose weight needs no gradient.

    `MatMul8bitLt.forward` (and `MatMul8bitFp.forward`, which serves training on a CPU) keeps its input in a plain
    attribute of `ctx`. Non-reentrant checkpointing only sees tensors that go through `save_for_backward`, so every int8
    linear's input stays alive until backward: L * (6h + 2i) bytes per token instead of L * 2h (1.66 MB against 0.20 MB
    on a 7B). Backward reads that input for the gradient of the int8 weight alone, which a frozen base never needs.

    Process-wide and safe to call again. Gradients stay bit-equal: backward computes the input's gradient from the
    weight and the output's gradient only. A weight that does need a gradient keeps the library's behaviour.
    """
    for class_name, (attribute, released) in _RETAINED_INPUT.items():
        function_class = getattr(_functions, class_name)
        if not hasattr(function_class.forward, "__wrapped__"):
            function_class.forward = staticmethod(_releasing(function_class.forward, attribute, released))


def _releasing(forward: Callable[..., torch.Tensor], attribute: str, released: Any) -> Callable[..., torch.Tensor]:
    @functools.wraps(forward)
    def wrapper(ctx: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = forward(ctx, *args, **kwargs)
        # An empty batch returns early and its backward reads ctx.A.
        if not ctx.needs_input_grad[1] and not getattr(ctx, "is_empty", False):
            setattr(ctx, attribute, released)
        return output

    return wrapper


def fix_cpu_dequantization() -> None:
    """4-bit weights are dequantised right on a CPU where the rows of a matrix are no whole number of blocks.

    Blocks of 64 values run over the end of a row. The CPU kernel counts the blocks of each row anew when it
    dequantises, so that a matrix [N, K] with K not a multiple of 64 comes back wrong by some 70 %. The CUDA kernels and
    the generic implementation take the values as one long row, and so does the same kernel if it is told of one row.

    Process-wide and safe to call again. Matrices with whole blocks per row go the same way as before, with the same
    values.
    """
    if _library:
        return
    original: Any = torch.library.get_kernel(f"bitsandbytes::{_DEQUANTIZE_OP}", "CPU")

    def dequantize(
        keys: Any, A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        one_row = shape if shape[-1] % blocksize == 0 else (1, prod(shape))
        return original.call_boxed(keys, A, absmax, blocksize, quant_type, one_row, dtype).view(tuple(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a kernel is overridden
        library.impl(_DEQUANTIZE_OP, dequantize, "CPU", with_keyset=True, allow_override=True)
    _library.append(library)  # the override lasts as long as this object


def stays_in_training_mode(module: nn.Module) -> bool:
    """Whether a module keeps `training=True` in a forward without gradient: quantised linears, for their CPU kernel.

    On a CPU (and nowhere else) the mode chooses bitsandbytes' kernel; that of training is wanted:

    * 8 bits: 16-bit activations instead of int8 ones, so that a policy is sampled and scored as it is trained. It is
      also four times as fast.
    * 4 bits: the layout that has a backward. In evaluation mode bitsandbytes re-packs the weights for good, and the
      next training step fails.
    """
    return isinstance(module, _QUANTISED)


def avoid_cpu_layout(linear: bnb.nn.Linear4bit) -> None:
    """Dequantise in evaluation mode on a CPU too where the re-packed layout takes no such shape."""
    if linear.in_features % _CPU_LAYOUT_COLUMNS or linear.out_features % _CPU_LAYOUT_ROWS:
        linear.support_avx512bf16_for_cpu = False
