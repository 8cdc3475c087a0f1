"""Part f: speed of fp8, compilation and the attention kernels, each against the plain way in one process."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_optimizations
from benchmarks.gpu.cell import Setup, require_cuda
from benchmarks.gpu.runner import Figures

_LENGTH = 4160
"""64 mod 128: where cuDNN's attention with a mask was seen to give gradients that are not finite (pytorch#196678)."""
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def optimizations(setup: Setup, figures: Figures) -> None:
    """The ratios of benchmarks/gpu_optimizations.py."""
    require_cuda()
    rows = []
    for what, plain_s, optimized_s in gpu_optimizations.comparisons():
        rows.append([what, f"{1e3 * plain_s:.2f}", f"{1e3 * optimized_s:.2f}", f"{optimized_s / plain_s:.2f}"])
        figures.add_table("optimizations", ("what", "plain, ms", "with it, ms", "ratio"), rows)


def attention_kernels(setup: Setup, figures: Figures) -> None:
    """Forward and backward of each kernel at a 7B's shape, with and without the mask of padded rows."""
    require_cuda()
    rows = []
    for masked in (False, True):
        for name, kernel in _KERNELS.items():
            rows.append([name, "padded rows" if masked else "causal", *_forward_and_backward(kernel, masked)])
            figures.add_table(
                f"attention, 2 x 28 heads x {_LENGTH} tokens, forward and backward",
                ("kernel", "mask", "ms", "gradients"),
                rows,
            )


def _forward_and_backward(
    kernel: SDPBackend, masked: bool, *, length: int = _LENGTH, device: str = "cuda"
) -> tuple[str, str]:
    """Milliseconds and whether the gradients are finite; or why the kernel does not take this."""
    torch.manual_seed(0)
    shape = (2, 28, length, 128)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=device).tril() if masked else None
    if mask is not None:
        padding = torch.arange(64)
        mask[0, :, :, :64] = False  # the first row is padded on the left
        mask[0, :, :64, :] = False
        mask[0, 0, padding, padding] = True  # as transformers does: no query without any key

    def step() -> None:
        for tensor in (query, key, value):
            tensor.grad = None
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        out.sum().backward()

    try:
        with sdpa_kernel(kernel):
            milliseconds = 1e3 * gpu_optimizations.seconds_of(step)
    except RuntimeError as error:  # no kernel of this kind for these inputs
        return "", str(error).splitlines()[0][:80]
    finite = all(bool(t.grad.isfinite().all()) for t in (query, key, value) if t.grad is not None)
    return f"{milliseconds:.2f}", "finite" if finite else "NOT FINITE"
