"""Optimizations of speed, memory and robustness; every function says what it changed, or why it did nothing."""

from optimization.apply import (
    apply_optimizations,
    configure_all_optimizations,
    optimize_models,
    optimized,
    preallocate_planned,
)
from optimization.cuda_optim import (
    autoconfigure_environment,
    enable_flash_attention,
    optimize_attention_operations,
    print_gpu_stats,
    setup_cuda_optimizations,
)
from optimization.fp8_optim import check_fp8_support, quantise_to_fp8
from optimization.gpu import get_vram
from optimization.memory_optim import (
    clean_memory,
    offload_checkpoints,
    optimize_memory_for_device,
    preallocate_cuda_memory,
    tile_mlps,
)
from optimization.optimizers import get_optimizer
from optimization.record import (
    AppliedOptimization,
    Change,
    ChosenSettings,
    Obstacle,
    Record,
    records_table,
    undo_all,
)
from optimization.small.efficient import Efficient, Helpers
from optimization.small.recommend import Recommendation, recommend_config
from optimization.training_optim import (
    AsyncDataLoader,
    BatchChoice,
    compile_forward,
    enable_torch_compile,
    get_optimal_batch_size_for_gpu,
    recover_from_nan,
)

__all__ = [
    "AppliedOptimization",
    "AsyncDataLoader",
    "BatchChoice",
    "Change",
    "ChosenSettings",
    "Efficient",
    "Helpers",
    "Obstacle",
    "Recommendation",
    "Record",
    "apply_optimizations",
    "autoconfigure_environment",
    "check_fp8_support",
    "clean_memory",
    "compile_forward",
    "configure_all_optimizations",
    "enable_flash_attention",
    "enable_torch_compile",
    "get_optimal_batch_size_for_gpu",
    "get_optimizer",
    "get_vram",
    "offload_checkpoints",
    "optimize_attention_operations",
    "optimize_memory_for_device",
    "optimize_models",
    "optimized",
    "preallocate_cuda_memory",
    "preallocate_planned",
    "print_gpu_stats",
    "quantise_to_fp8",
    "recommend_config",
    "records_table",
    "recover_from_nan",
    "setup_cuda_optimizations",
    "tile_mlps",
    "undo_all",
]
