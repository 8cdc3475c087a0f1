"""Small-budget training in one name: sizes, memory, precision, quantisation, optimizers.

from optimization import Efficient

model = Efficient.micro_llm(vocab_size=8_000)
optimizer = Efficient.get_optimizer(model, "adam8bit", lr=1e-3)
amp = Efficient.mixed_precision(model, optimizer)

examples/train_small.py is a whole run.
"""

from typing import Any

from core.units import gb
from optimization import small_models
from optimization.card import find_card
from optimization.mixed_precision import MixedPrecision
from optimization.optimizers import get_optimizer
from optimization.quantize import Quantize
from optimization.recommend import Recommendation, recommend_config
from optimization.record import AppliedOptimization, Change
from planner.full_training import FullTraining, FullTrainingPlan, TrainingPrecision, plan_full_training
from planner.shapes import ModelShape, load_shape, shape_from_config


class Efficient:
    """The functions below under one name; it holds no state."""

    nano_llm = staticmethod(small_models.nano_llm)
    micro_llm = staticmethod(small_models.micro_llm)
    tiny_llm = staticmethod(small_models.tiny_llm)
    small_llm = staticmethod(small_models.small_llm)
    medium_llm = staticmethod(small_models.medium_llm)
    count_params = staticmethod(small_models.count_params)
    mixed_precision = MixedPrecision
    quantize = Quantize
    get_optimizer = staticmethod(get_optimizer)
    recommend_config = staticmethod(recommend_config)

    @staticmethod
    def get_vram() -> float:
        """Decimal GB of the first GPU, as the driver reports them; 0.0 where there is none."""
        card = find_card()
        return gb(card.total_bytes) if card is not None else 0.0

    @staticmethod
    def enable_checkpointing(model: Any) -> AppliedOptimization:
        """Keep each block's input only and compute the rest again in backward: less memory, about a third more time.

        `model` is a transformers model.
        """
        before = model.is_gradient_checkpointing
        if before:
            return AppliedOptimization(name="gradient checkpointing", skipped="it is on already")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return AppliedOptimization(
            name="gradient checkpointing",
            changes=(Change(what="is_gradient_checkpointing", before=False, after=True),),
            effect="see estimate_savings",
            undo_steps=[model.gradient_checkpointing_disable],
        )

    @staticmethod
    def estimate_memory(
        model: Any,
        batch: int,
        length: int,
        *,
        optimizer: str = "adamw",
        precision: TrainingPrecision = "mixed",
        checkpointing: bool = False,
    ) -> FullTrainingPlan:
        """Allocated bytes of a step that trains all parameters of `model` on `batch` rows of `length` tokens.

        `model`: a transformers model (the meta device will do), or its name (hub id or folder, see
        `planner.shapes.load_shape`). CUDA context and allocator overhead come on top; `fits` counts them.
        """
        return plan_full_training(
            FullTraining(
                shape=_shape_of(model),
                batch=batch,
                length=length,
                optimizer=optimizer,
                precision=precision,
                checkpointing=checkpointing,
            )
        )

    @staticmethod
    def estimate_savings(model: Any, batch: int, length: int) -> dict[str, int]:
        """Bytes that each change alone takes off the peak of a float32 AdamW step without checkpointing.

        `all`: mixed precision, checkpointing and AdaLomo together.
        """

        def peak(**changed: Any) -> int:
            return Efficient.estimate_memory(model, batch, length, **{"precision": "fp32", **changed}).peak_bytes

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


__all__ = ["Efficient", "Recommendation"]
