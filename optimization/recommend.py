"""What a card of a given size can do, as the memory planner sees it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.errors import UserError
from core.units import gb
from optimization.small_models import SIZES, model_config
from planner.components import kv_bytes_per_token, weight_bytes
from planner.constants import CUDA_CONTEXT_BYTES
from planner.fit import largest_micro_batch
from planner.full_training import FullTraining, plan_full_training
from planner.plan import MemoryPlan, plan, plan_run, usable_bytes
from planner.settings import Precision
from planner.shapes import ModelShape, known_shapes, shape_from_config
from schemas.compose import compose_run_config, run_config_names
from schemas.run import RunConfig, load_run_config

Training = Literal["scratch", "teacher", "none"]

_VOCAB_SIZE = 32_000
_MIN_BATCH, _MAX_BATCH = 8, 256
"""Rows of one forward: fewer leave a card idle, more only add latency."""
_LENGTHS = (2048, 1024)
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"checkpointing": True, "optimizer": "adam8bit"},
    {"checkpointing": True, "optimizer": "lion8bit"},
)
"""For training from scratch, the mildest first; mixed precision is always on."""
_INFERENCE_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    model: str
    batch: int
    """Rows of one forward (and backward)."""
    length: int
    """Tokens a row."""
    optimisations: tuple[str, ...]
    predicted_gb: float
    """Peak, decimal GB, with the CUDA context and without what the allocator loses."""
    use: str
    """What to call."""


def recommend_config(vram_gb: float, training: Training | bool = True) -> Recommendation:
    """The largest model that a card of `vram_gb` decimal GB trains or serves, with batch, length and optimisations.

    `scratch` (or True): all parameters of one of `Efficient`'s sizes, vocabulary 32,000, 8 rows or more.
    `teacher`: the shipped RLT run configuration with the largest teacher that fits, and the largest micro-batch.
    `none` (or False): serving a Qwen2.5 with 8 sequences of 4,096 tokens.

    Raises:
        UserError: not even the smallest model fits.
    """
    kinds = {True: "scratch", False: "none"}
    kind = kinds[training] if isinstance(training, bool) else training
    gpu_bytes = round(vram_gb * 1e9)
    found = {"scratch": _from_scratch, "teacher": _teacher, "none": _serving}[kind](gpu_bytes)
    if found is None:
        raise UserError(
            f"a card of {vram_gb} GB for training={training!r}",
            expected="a card that holds the smallest model",
            remedy="use a larger card, or the CPU: ./launch_mono.sh trains the embedded model",
        )
    return found


def _from_scratch(gpu_bytes: int) -> Recommendation | None:
    for name in reversed(SIZES):
        shape = shape_from_config(f"{name}_llm", model_config(SIZES[name], _VOCAB_SIZE).to_dict())
        for changes in _CHANGES:
            for length in _LENGTHS:
                training = FullTraining(shape=shape, batch=_MIN_BATCH, length=length, **changes)
                if plan_full_training(training).fits(gpu_bytes):
                    return _describe_scratch(name, _with_largest_batch(training, gpu_bytes))
    return None


def _with_largest_batch(training: FullTraining, gpu_bytes: int) -> FullTraining:
    while training.batch < _MAX_BATCH:
        larger = replace(training, batch=2 * training.batch)
        if not plan_full_training(larger).fits(gpu_bytes):
            break
        training = larger
    return training


def _describe_scratch(name: str, training: FullTraining) -> Recommendation:
    optimisations = ["mixed precision", *(["checkpointing"] if training.checkpointing else []), training.optimizer]
    peak = plan_full_training(training).peak_bytes + CUDA_CONTEXT_BYTES.value
    make, optimizer = f"Efficient.{name}_llm(vocab_size={_VOCAB_SIZE})", training.optimizer
    return Recommendation(
        model=f"{name}_llm",
        batch=training.batch,
        length=training.length,
        optimisations=tuple(optimisations),
        predicted_gb=gb(peak),
        use=f"{make}, Efficient.get_optimizer(model, {optimizer!r}, lr)",
    )


def _teacher(gpu_bytes: int) -> Recommendation | None:
    fitting = [(name, config, made) for name, config, made in _planned_runs(gpu_bytes) if made.fits()]
    if not fitting:
        return None
    name, config, made = max(fitting, key=lambda run: (run[2].settings.teacher.num_params, run[2].settings.row_len))
    micro_batch = largest_micro_batch(made.settings, gpu_bytes) or made.settings.micro_batch
    settings = replace(made.settings, micro_batch=micro_batch)
    optimisations = [
        {"int8": "8-bit bases", "nf4": "NF4 bases (QLoRA)"}.get(settings.precision, settings.precision),
        f"LoRA rank {settings.lora_r}",
        settings.optimizer,
        *(["checkpointing"] if settings.checkpointing != "none" else []),
        *(["student is the teacher's base"] if settings.student is None else []),
    ]
    return Recommendation(
        model=config.model_name_or_path,
        batch=micro_batch,
        length=settings.row_len,
        optimisations=tuple(optimisations),
        predicted_gb=gb(plan(settings, gpu_bytes).max_bytes),
        use=f"./launch_mono.sh {name} per_device_train_batch_size={micro_batch}",
    )


def _planned_runs(gpu_bytes: int) -> Iterator[tuple[str, RunConfig, MemoryPlan]]:
    for name in run_config_names():
        if "_mono_" in name:
            config = load_run_config(compose_run_config(name))
            assert isinstance(config, RunConfig), "the mono configurations are RLT runs"
            yield name, config, plan_run(config, gpu_bytes)


def _serving(gpu_bytes: int) -> Recommendation | None:
    shapes = sorted(
        (shape for hub_id, shape in known_shapes().items() if hub_id.startswith("qwen/qwen2.5-")),
        key=lambda shape: -shape.num_params,
    )
    precisions: tuple[tuple[Precision, str], ...] = (
        ("bf16", "bf16"),
        ("int8", "8-bit weights"),
        ("nf4", "NF4 weights"),
    )
    for shape in shapes:
        for precision, words in precisions:
            needed = _serving_bytes(shape, precision)
            if needed <= usable_bytes(gpu_bytes):
                return Recommendation(
                    model=shape.name,
                    batch=_MIN_BATCH,
                    length=_INFERENCE_LENGTH,
                    optimisations=(words,),
                    predicted_gb=gb(needed),
                    use=f"transformers or vLLM with {shape.name}",
                )
    return None


def _serving_bytes(shape: ModelShape, precision: Precision) -> float:
    kv_cache = _MIN_BATCH * _INFERENCE_LENGTH * kv_bytes_per_token(shape)
    logits = 2 * 4 * _MIN_BATCH * shape.vocab
    return weight_bytes(shape, precision) + kv_cache + logits + CUDA_CONTEXT_BYTES.value
