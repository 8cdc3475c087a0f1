"""Changes that save memory in a run of any method: batch, checkpointing, precision, and the next smaller model."""

from collections.abc import Iterator

from planner.settings import Change, PlanSettings
from planner.shapes import ModelShape, known_shapes, model_sizes

_FAMILY = "Qwen2.5"


def family_sizes() -> list[str]:
    """Models that are proposed, the smallest first."""
    return list(model_sizes(_FAMILY).values())


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def batch_changes(settings: PlanSettings) -> Iterator[Change]:
    """The next smaller micro-batch; checkpointing where it is off."""
    smaller = [d for d in divisors(settings.train_batch) if d < settings.micro_batch]
    if smaller:
        yield f"micro-batch {settings.micro_batch} -> {smaller[-1]}", {"per_device_train_batch_size": smaller[-1]}
    if settings.checkpointing == "none":
        yield "gradient checkpointing on", {"gradient_checkpointing": True}


def precision_changes(settings: PlanSettings) -> Iterator[Change]:
    """Narrower bases."""
    if settings.precision in ("bf16", "fp32"):
        yield "8-bit bases", {"model_args.load_in_8bit": True}
    if settings.precision != "nf4":
        yield "4-bit bases", {"model_args.load_in_8bit": False, "model_args.load_in_4bit": True}


def smaller_model(shape: ModelShape) -> str | None:
    """The largest proposed model of under 80 % of the parameters."""
    names = (name for name in family_sizes() if known_shapes()[name.lower()].num_params < 0.8 * shape.num_params)
    return next(iter(reversed(list(names))), None)
