"""Settings of the optimizations of a run; `optimization/README.md` says what each is worth.

Optimizer, learning rate and gradient checkpointing are TRL's (`optim`, `learning_rate`, `gradient_checkpointing`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from schemas.values import PositiveInt


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    allow_tf32: bool = False
    """Float32 matrix products on the GPU in TF32 (10 bits of mantissa); products in 16 bits are not touched."""
    sdpa_backend: Literal["torch", "auto", "cudnn", "flash", "efficient"] = "torch"
    """Kernel that torch's attention tries first on a GPU; `torch`, `auto`: its own order. `cudnn` is refused (NaN)."""
    use_flash_attention: bool = False
    """Replace `sdpa` by Flash Attention 3 or 2 where the package and the GPU are there: no padding is computed."""
    expandable_segments: bool = False
    """Let the trainer's allocator grow its segments: less memory lost between tensors of varying sizes."""
    mlp_tile_tokens: PositiveInt | None = None
    """Run the MLPs on this many tokens at a time; their wide activations then exist for one tile only."""
    preallocate_memory: bool = False
    """Take the planned peak from the GPU before anything is loaded: one that is too full fails in the first second."""
    use_fp8: bool = False
    """On a GPU with fp8: KV cache and an unquantised generator in fp8; frozen models of their own scored in fp8."""
    compile_models: bool = False
    """torch.compile for the forward of a student and a reference of their own (GPU; bf16 or fp8; a minute once)."""

    def __post_init__(self) -> None:
        if self.sdpa_backend == "cudnn":
            raise ValueError(
                "`sdpa_backend` is cudnn; the gradients of cuDNN's attention are NaN for some lengths and models "
                "(torch 2.11 and later, pytorch#196678), so no run uses it. Use sdpa_backend=auto."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingOptimizationConfig(OptimizationConfig):
    """Those of a run that trains."""

    offload_checkpoints: bool = False
    """Keep the layer inputs that gradient checkpointing saves in pinned host memory, copied beside the computation."""
    recover_from_nan: bool = False
    """Get past non-finite losses, gradients and rewards: skip the step, then lower the rate, then roll back."""
    max_recoveries: PositiveInt = 8
    """Bad steps after which a run with `recover_from_nan` stops all the same."""
    lr_backoff: Annotated[float, Field(ge=1e-6, lt=1)] = 0.5
    """Factor of the learning rate at each backing off."""
