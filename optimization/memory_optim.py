"""GPU memory: allocator settings, activation checkpointing and offloading, tiled MLPs, cleaning.

Letters: B rows, T tokens, H hidden size.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import UserError
from core.units import format_gb
from optimization.gpu import NO_CARD, Card, find_card, free_and_total_bytes, has_gpu
from optimization.record import (
    AppliedOptimization,
    Change,
    ChosenSettings,
    Obstacle,
    announce,
    nothing,
    together,
)

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDABLE = "expandable_segments"
_MIN_OFFLOADED_BYTES = 1 << 20
"""Smaller saved tensors (masks, positions, statistics of norms) stay on the GPU: their copies would only cost time."""
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def optimize_memory_for_device(
    *, expandable_segments: bool = True, card: Card | None = None
) -> AppliedOptimization | Obstacle:
    """Let the trainer's allocator map pages into growing segments instead of keeping blocks of every size it ever saw.

    vLLM's sleeping memory is a pool of its own, for which vLLM switches the setting off where it finds it, so the two
    do not meet: 0.26 reads PYTORCH_CUDA_ALLOC_CONF (`generation.vllm_engine` copies the setting there), later versions
    both names and the live allocator. That is told as well as the environment: torch reads the latter only once.
    """
    card = card or find_card()
    if not expandable_segments:
        return nothing("allocator", "expandable_segments is off")
    if card is None:
        return nothing("allocator", f"{NO_CARD}; the allocator of the CPU has no segments")
    name = next((variable for variable in _ALLOCATOR_VARIABLES if variable in os.environ), _ALLOCATOR_VARIABLES[0])
    before = os.environ.get(name)
    if _EXPANDABLE in (before or ""):
        return nothing("allocator", f"{name}={before} was set outside and is kept")
    settings = ",".join(part for part in (before, f"{_EXPANDABLE}:True") if part)
    _set_allocator(name, settings)
    return AppliedOptimization(
        name="allocator",
        changes=(Change(what=name, before=before or "not set", after=settings),),
        effect="reserved over allocated memory of what comes and goes: 1.06 instead of 1.20 (simulated)",
        undo_steps=[lambda: _set_allocator(name, before, f"{_EXPANDABLE}:False")],
    )


def _set_allocator(variable: str, value: str | None, live: str | None = None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
    if has_gpu():
        torch._C._accelerator_setAllocatorSettings(live or value or "")


def clean_memory() -> AppliedOptimization | Obstacle:
    """Drop unreachable objects and give the allocator's unused blocks back to the driver."""
    return together("cleaning", [_drop_unreachable_objects(), _give_blocks_back()])


def _drop_unreachable_objects() -> AppliedOptimization | Obstacle:
    if not (collected := gc.collect()):
        return nothing("objects", "no object is unreachable")
    return AppliedOptimization(name="objects", changes=(Change(what="unreachable objects", before=collected, after=0),))


def _give_blocks_back() -> AppliedOptimization | Obstacle:
    if not has_gpu():
        return nothing("blocks", f"no blocks to give back: {NO_CARD}")
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    after = torch.cuda.memory_reserved()
    if after == before:
        return nothing("blocks", "no block of the allocator is unused")
    return AppliedOptimization(
        name="blocks",
        changes=(Change(what="reserved by torch", before=format_gb(before), after=format_gb(after)),),
        effect=f"{format_gb(before - after)} given back (measured just now)",
    )


def preallocate_cuda_memory(num_bytes: int, *, keep: bool = False) -> AppliedOptimization | Obstacle:
    """Take `num_bytes` from the GPU in one piece, to find out at once whether they are there.

    `keep` leaves them in torch's cache, so that nobody else takes them. A vLLM in this process is somebody else: it
    allocates past torch's cache, so a run with one gives them back.

    Raises:
        UserError: the GPU has less than that free.
    """
    if not has_gpu():
        return nothing("preallocation", NO_CARD)
    free_bytes, total_bytes = free_and_total_bytes()
    if num_bytes > free_bytes + torch.cuda.memory_reserved() - torch.cuda.memory_allocated():
        raise UserError(
            f"{format_gb(num_bytes)} to preallocate, and the GPU has {format_gb(free_bytes)} free",
            expected=f"the peak of the memory plan within the GPU's {format_gb(total_bytes)}",
            remedy="nvidia-smi lists what else runs on the GPU; stop it, or lower per_device_train_batch_size",
        )
    block = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    del block
    if not keep:
        torch.cuda.empty_cache()
        return nothing("preallocation", f"{format_gb(num_bytes)} are there; given back, since vLLM takes them itself")
    return AppliedOptimization(
        name="preallocation",
        changes=(Change(what=format_gb(num_bytes), before="free", after="kept in torch's cache"),),
        effect="a GPU that is too full fails now; saves no memory",
        undo_steps=[torch.cuda.empty_cache],
    )


def checkpoint_blocks(model: Any) -> AppliedOptimization | Obstacle:
    """Keep each block's input only and compute the rest again in backward: less memory, about a third more time.

    `model` is a transformers model; what it saves: `Efficient.estimate_training_savings`.
    """
    if model.is_gradient_checkpointing:
        return nothing("gradient checkpointing", "it is on already")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return AppliedOptimization(
        name="gradient checkpointing",
        changes=(Change(what="is_gradient_checkpointing", before=False, after=True),),
        effect="predicted by Efficient.estimate_training_savings",
        undo_steps=[model.gradient_checkpointing_disable],
    )


def enable_checkpointing(model: Any) -> Any:
    """`checkpoint_blocks`, which returns the model: `model = enable_checkpointing(model)`; what was done is logged.

    `model.gradient_checkpointing_disable()` takes it back.
    """
    announce(checkpoint_blocks(model))
    return model


def tile_mlps(model: nn.Module, tile_tokens: int) -> AppliedOptimization | Obstacle:
    """Run every gated MLP of `model` on `tile_tokens` tokens at a time.

    An MLP works on each token alone, so the result is that of the whole (LLM.int8 looks for outlier columns in each
    tile, a finer choice than over all tokens). With gradients each tile is checkpointed: the activations of width I
    exist for one tile only, in forward and in backward, for one more MLP forward. Idea: ALST, arXiv 2506.13996.
    """
    mlps = [module for module in model.modules() if all(hasattr(module, name) for name in _MLP_LINEARS)]
    if not mlps:
        return nothing("tiled MLP", f"{type(model).__name__} has no gated MLP ({', '.join(_MLP_LINEARS)})")
    for mlp in mlps:
        mlp.forward = _tiled(mlp.forward, tile_tokens)

    def undo() -> None:
        for mlp in mlps:
            del mlp.forward

    return AppliedOptimization(
        name="tiled MLP",
        changes=(Change(what=f"tokens at a time in {len(mlps)} MLPs", before="all", after=tile_tokens),),
        effect="MLP activations of one tile instead of all tokens, for one more MLP forward; time not measured",
        undo_steps=[undo],
    )


def _tiled(forward: Any, tile_tokens: int) -> Any:
    def run(hidden_BTH: Tensor) -> Tensor:
        num_tokens = hidden_BTH.shape[:-1].numel()
        if num_tokens <= tile_tokens:
            return forward(hidden_BTH)
        tiles = hidden_BTH.reshape(1, num_tokens, hidden_BTH.shape[-1]).split(tile_tokens, dim=1)
        if torch.is_grad_enabled():
            outputs = [checkpoint(forward, tile, use_reentrant=False) for tile in tiles]
        else:
            outputs = [forward(tile) for tile in tiles]
        return torch.cat(outputs, dim=1).view_as(hidden_BTH)

    return run


class _WithItsCache:
    """`torch.cuda` for TRL's offloading, which would empty the allocator's cache at every micro-batch.

    Every block would then be asked of the driver anew (TRL 1.16 does so wherever bitsandbytes is loaded, against a leak
    through tensors that it tracks; those it drops first, and the host empties the cache before each generation phase).
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def empty_cache(self) -> None:
        """Do nothing: the cache stays."""


class CheckpointOffload:
    """Saved activations above 1 MiB go to pinned host memory and come back for backward, on a stream of their own.

    Enter it around forward and backward of a micro-batch. With gradient checkpointing what is saved are the layers'
    inputs: 2 * H bytes per token and layer (0.2 MB per token on a 7B). One waits on the GPU for its copy while the
    next layer is computed, as the memory plan has it (TRL's own choice is five).
    """

    def __init__(self, model: nn.Module) -> None:
        from trl.models.activation_offloading import OffloadActivations

        self._offload: Any = OffloadActivations(
            use_pin_memory=True, use_streams=True, min_offload_size=_MIN_OFFLOADED_BYTES, max_fwd_stash_size=1
        )
        self._offload.device_module = _WithItsCache()
        self._offload.update_model_params(model)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._offload:
            yield


def offload_checkpoints(*, gradient_checkpointing: bool) -> ChosenSettings | Obstacle:
    """Whether layer inputs can go to host memory here; the trainer's `CheckpointOffload` moves them."""
    if not has_gpu():
        return nothing("checkpoint offload", f"{NO_CARD}; the layer inputs are in host memory already")
    if not gradient_checkpointing:
        return nothing("checkpoint offload", "gradient_checkpointing is off, so there are no checkpoints")
    return ChosenSettings(
        name="checkpoint offload",
        settings={"offload_checkpoints": True},
        reason="layer inputs wait in pinned host memory during each micro-batch: 2 * hidden * layers bytes per token "
        "less on the GPU; time not measured",
    )
