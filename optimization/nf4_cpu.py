"""Right 4-bit weights on a CPU where the rows of a matrix are no whole number of blocks.

Blocks of 64 values run over the end of a row. bitsandbytes 0.50.2's CPU kernel counts the blocks of each row anew when
it dequantises, so that a matrix [N, K] with K not a multiple of 64 comes back wrong by some 70 %. Its CUDA kernels and
its generic implementation take the values as one long row, and so does the same kernel if it is told of one row.
"""

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_OP = "bitsandbytes::dequantize_4bit"
_library: list[torch.library.Library] = []


def fix_cpu_dequantization() -> None:
    """Make bitsandbytes' CPU dequantisation right for every shape. Process-wide and safe to call again.

    Matrices with whole blocks a row go the same way as before, with the same values.
    """
    if _library:
        return
    import bitsandbytes  # noqa: F401  registers the op

    original: Any = torch.library.get_kernel(_OP, "CPU")

    def dequantize(
        keys: Any, A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        one_row = shape if shape[-1] % blocksize == 0 else (1, prod(shape))
        return original.call_boxed(keys, A, absmax, blocksize, quant_type, one_row, dtype).view(tuple(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a kernel is overridden
        library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    _library.append(library)  # the override lasts as long as this object
