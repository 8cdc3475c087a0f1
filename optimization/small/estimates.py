"""Estimates before anything is run: memory of a training step, sizes of quantised weights."""

from typing import Any

import torch
from torch import nn

from core.units import gb, sizes_line
from optimization.small.quantize import bytes_when_quantised, quantised_bytes
from planner.full_training import FullTraining, FullTrainingPlan, TrainingPrecision, plan_full_training
from planner.shapes import ModelShape, load_shape, shape_from_config


def estimate_memory(
    model: Any,
    batch_size: int,
    seq_len: int,
    *,
    optimizer: str = "adamw",
    precision: TrainingPrecision | None = None,
    checkpointing: bool | None = None,
) -> FullTrainingPlan:
    """Memory of a step that trains all parameters of `model` on `batch_size` rows of `seq_len` tokens.

        mem = estimate_memory(model, batch_size=4, seq_len=2048)
        mem["total"]  # decimal GB: mem["model"] + mem["activations"] + mem["gradients"] + mem["optimizer"]

    The result also has bytes (`peak_bytes`), the moment of the peak (`binding_moment`) and `fits(gpu_bytes)`.

    `model`: a transformers model (the meta device will do), or its name (hub id or folder, see
    `planner.shapes.load_shape`). None is what the model has: mixed precision for float32 weights, bf16 for 16-bit ones;
    checkpointing where it is enabled. CUDA context and allocator overhead come on top; `fits` counts them.
    """
    if precision is None:
        precision = "mixed" if getattr(model, "dtype", torch.float32) == torch.float32 else "bf16"
    if checkpointing is None:
        checkpointing = getattr(model, "is_gradient_checkpointing", False)
    return plan_full_training(
        FullTraining(
            shape=_shape_of(model),
            batch=batch_size,
            length=seq_len,
            optimizer=optimizer,
            precision=precision,
            checkpointing=checkpointing,
        )
    )


class WeightSavings(dict[str, float]):
    """Decimal GB of weights: `original`, `quantized` and their difference `savings`."""

    def __repr__(self) -> str:
        return f"{sizes_line(self)} ({self['savings'] / self['original']:.1%})"


def estimate_savings(model: nn.Module, bits: int = 4) -> WeightSavings:
    """Sizes of the weights as they are and after `Efficient.quantize.static(model, bits)`, which is not done.

    Linear layers shrink; embeddings, norms and the head stay as they are, so 4 bits are not an eighth of float32.

    Raises:
        UserError: other widths than 8 and 4, or a model without linear layers to quantise.
    """
    original, quantized = quantised_bytes(model), bytes_when_quantised(model, bits)
    return WeightSavings(original=gb(original), quantized=gb(quantized), savings=gb(original - quantized))


def estimate_training_savings(model: Any, batch_size: int, seq_len: int) -> dict[str, int]:
    """Bytes that each change alone takes off the peak of a float32 AdamW step without checkpointing.

    `all`: mixed precision, checkpointing and AdaLomo together.
    """

    plain: dict[str, Any] = {"precision": "fp32", "checkpointing": False}

    def peak(**changed: Any) -> int:
        return estimate_memory(model, batch_size, seq_len, **(plain | changed)).peak_bytes

    changes: dict[str, dict[str, Any]] = {
        "mixed precision": {"precision": "mixed"},
        "checkpointing": {"checkpointing": True},
        "adam8bit": {"optimizer": "adam8bit"},
        "lion8bit": {"optimizer": "lion8bit"},
        "adalomo": {"optimizer": "adalomo"},
        "all": {"precision": "mixed", "checkpointing": True, "optimizer": "adalomo"},
    }
    return {name: peak() - peak(**changed) for name, changed in changes.items()}


def _shape_of(model: Any) -> ModelShape:
    if isinstance(model, str):
        return load_shape(model)
    return shape_from_config(type(model).__name__, model.config.to_dict())
