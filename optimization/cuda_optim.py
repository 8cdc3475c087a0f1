"""Settings of torch on an NVIDIA GPU: TF32, attention kernels, and statistics of the GPU.

`torch.backends.cudnn.benchmark` is left alone: it tunes convolutions, and these models have none. cuDNN's attention is
never used (`switch_cudnn_attention_off`).
"""

import contextlib
import os
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.errors import UserError
from core.log import console
from core.packages import is_installed
from core.units import format_gb
from optimization.gpu import AMPERE, HOPPER, NO_CARD, Card, find_card, free_and_total_bytes
from optimization.record import AppliedOptimization, Change, ChosenSettings, Obstacle, nothing, together

SdpaBackend = Literal["torch", "auto", "cudnn", "flash", "efficient"]
AttentionImplementation = Literal["sdpa", "flash_attention_2", "flash_attention_3"]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""In torch's own order."""


def setup_cuda_optimizations(
    *, allow_tf32: bool = True, sdpa_backend: SdpaBackend = "auto", card: Card | None = None
) -> AppliedOptimization | Obstacle:
    """TF32 for float32 products and the order of attention kernels. `card`: the one to choose for, found if None."""
    card = card or find_card()
    parts = [_allow_tf32(card)] if allow_tf32 else []
    return together("cuda", [*parts, optimize_attention_operations(sdpa_backend, card=card)])


def _allow_tf32(card: Card | None) -> AppliedOptimization | Obstacle:
    if card is None:
        return nothing("tf32", NO_CARD)
    if card.capability < AMPERE:
        return nothing("tf32", f"{card} has no TF32 (compute 8.0 and above)")
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        return nothing("tf32", f"float32 products are {before} already")
    torch.set_float32_matmul_precision("high")
    return AppliedOptimization(
        name="tf32",
        changes=(Change(what="float32 products", before=before, after="high (TF32)"),),
        effect="float32 products up to 8 times as fast by the A100's data sheet; a run's speed with it: not measured",
        undo_steps=[lambda: torch.set_float32_matmul_precision(before)],
    )


def optimize_attention_operations(
    backend: SdpaBackend = "auto", *, card: Card | None = None
) -> AppliedOptimization | Obstacle:
    """Choose the kernel that `scaled_dot_product_attention` tries first; one that cannot serve hands on to the next.

    `flash` and `efficient` put that kernel first. `auto` keeps torch's own order (flash, memory-efficient, plain) less
    cuDNN, which torch 2.11 and later would try before them from Hopper on; `torch` changes nothing. A run switches
    cuDNN off with any of them (`switch_cudnn_attention_off`).

    Raises:
        UserError: `backend` is none of them.
    """
    card = card or find_card()
    if backend not in ("torch", "auto", *_BACKENDS):
        raise UserError(
            f"{backend!r} as the first attention kernel",
            expected="torch, auto, flash or efficient; cuDNN's gradients are NaN for some lengths (pytorch#196678)",
            remedy="optimize_attention_operations() keeps torch's own order without cuDNN",
        )
    if backend == "torch":
        return nothing("attention", "sdpa_backend=torch keeps torch's own order")
    if card is None:
        return nothing("attention", NO_CARD)
    if backend == "auto":
        return _without_cudnn(card)
    order = [_BACKENDS[name] for name in (backend, *(name for name in _BACKENDS if name != backend))]
    context = contextlib.ExitStack()
    context.enter_context(sdpa_kernel(order, set_priority=True))
    return AppliedOptimization(
        name="attention",
        changes=(Change(what="first attention kernel", before="torch's choice", after=backend),),
        effect="not measured",
        undo_steps=[context.close],
    )


def _without_cudnn(card: Card) -> AppliedOptimization | Obstacle:
    if card.capability < HOPPER:
        return nothing("attention", f"torch's own order is kept below compute 9.0, and this is {card}")
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return nothing("attention", "cuDNN's kernel is off already; torch's own order is kept")
    switch_cudnn_attention_off()
    return AppliedOptimization(
        name="attention",
        changes=(Change(what="cuDNN's attention", before="on", after="off"),),
        effect="no NaN gradients from it (every run on a GPU has it off)",
        undo_steps=[lambda: torch.backends.cuda.enable_cudnn_sdp(True)],
    )


def switch_cudnn_attention_off() -> None:
    """Switch cuDNN off in `scaled_dot_product_attention`, which tries it first on Hopper from torch 2.11 on.

    Its backward gives NaN for queries whose scores are very low (Qwen2.5 has such a head) where a mask is passed and
    the length is 64 more than a multiple of 128 (pytorch#196678, trl#7181). Importing vLLM's CUDA build does the same.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def enable_flash_attention(*, current: str = "sdpa", card: Card | None = None) -> ChosenSettings | Obstacle:
    """The setting `model_args.attn_implementation` for this machine: Flash Attention 3, 2, or what is set already.

    3 needs a Hopper GPU and the package flash_attn_interface, 2 needs Ampere or later and flash_attn.
    """
    card = card or find_card()
    if current != "sdpa":
        return nothing("flash attention", f"attn_implementation={current} was chosen by the configuration")
    if card is None:
        return nothing("flash attention", f"{NO_CARD}; sdpa stays")
    wanted: AttentionImplementation
    if card.capability[0] == HOPPER[0] and is_installed("flash_attn_interface"):
        wanted = "flash_attention_3"
    elif card.capability >= AMPERE and is_installed("flash_attn"):
        wanted = "flash_attention_2"
    else:
        reason = "compute 8.0 or above" if card.capability < AMPERE else "the package flash_attn"
        return nothing("flash attention", f"it needs {reason}, and this is {card}; sdpa stays")
    return ChosenSettings(
        name="flash attention",
        settings={"model_args.attn_implementation": wanted},
        reason="padding is not computed, no mask in memory",
    )


def autoconfigure_environment(*, card: Card | None = None) -> AppliedOptimization | Obstacle:
    """Environment variables that torch, tokenizers and OpenMP read in this process and its children.

    Call before torch computes anything: OpenMP reads its policy when its threads start. Variables that are already set
    are kept.
    """
    card = card or find_card()
    wanted = {
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep, so that torch and vLLM can share a CPU
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers' threads do not survive the fork of data workers
    }
    if card is not None:
        wanted["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # device numbers are those of nvidia-smi
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    if not new:
        return nothing("environment", "every variable is set already: " + ", ".join(wanted))
    os.environ.update(new)

    def remove(name: str) -> None:
        os.environ.pop(name, None)

    return AppliedOptimization(
        name="environment",
        changes=tuple(Change(what=name, before="not set", after=value) for name, value in new.items()),
        effect="not measured",
        skipped=None if card is not None else f"the variables of a GPU: {NO_CARD}",
        undo_steps=[lambda name=name: remove(name) for name in new],  # type: ignore[misc]
    )


def print_gpu_stats() -> None:
    """Name, memory and allocator state of the GPU on the console; changes nothing."""
    card = find_card()
    if card is None:
        console.print(f"GPU: none ({NO_CARD})")
        return
    free_bytes, total_bytes = free_and_total_bytes()
    lines = {
        "GPU": str(card),
        "free": f"{format_gb(free_bytes)} of {format_gb(total_bytes)}",
        "allocated by torch": f"{format_gb(torch.cuda.memory_allocated())}, at most "
        f"{format_gb(torch.cuda.max_memory_allocated())} so far",
        "reserved by torch": format_gb(torch.cuda.memory_reserved()),
    }
    for label, value in lines.items():
        console.print(f"{label}: {value}", highlight=False)
