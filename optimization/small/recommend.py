"""Recommended configuration for a GPU of a given size, from the memory planner.

Recommendations are monotone: with more memory neither model, tokens per row nor tokens per forward ever fall. Each kind
of training is a ladder of rungs that grow in all three, and the answer is the highest rung that fits.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from core.errors import UserError
from core.units import gb
from optimization.catalogue import MODELS
from optimization.small.models import SIZES, model_config
from planner.components import kv_bytes_per_token, weight_bytes
from planner.constants import CUDA_CONTEXT_BYTES
from planner.full_training import FullTraining, FullTrainingPlan, plan_full_training
from planner.plan import plan, usable_bytes
from planner.settings import Precision
from planner.shapes import ModelShape, known_shapes, model_sizes, shape_from_config
from planner.teacher import TeacherSettings, teacher_settings
from schemas.compose import compose_run_config
from schemas.run import RunConfig, load_teacher_config

Training = Literal["scratch", "teacher", "none"]

MIN_CARD_GB = 4.0
_VOCAB_SIZE = 32_000
_SCRATCH_RUNGS = (
    ("tiny", 1024, 4),
    ("tiny", 1024, 8),
    ("small", 1024, 8),
    ("medium", 1024, 8),
    ("medium", 2048, 8),
    ("medium", 4096, 8),
    ("medium", 4096, 16),
)
"""Size, tokens per row, rows: the model grows first. 65,536 tokens per forward keep any GPU busy."""
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"checkpointing": True, "optimizer": "adam8bit"},
)
"""For training from scratch, the mildest first; mixed precision is always on."""
_ROWS_OF_8192 = "max_prompt_length=4096 max_completion_length=4096"
_QWEN = MODELS["qwen2.5"]
_TEACHER_RUNGS = tuple(
    (f"teacher_rlt_mono_{card}", f"{_ROWS_OF_8192} {words} per_device_train_batch_size={rows}".replace("  ", " "))
    for card, words, rows in (
        ("8gb", f"model_name_or_path={_QWEN['0.5b']}", 1),
        ("8gb", f"model_name_or_path={_QWEN['1.5b']}", 1),
        ("8gb", "", 1),
        ("12gb", "", 1),
        ("16gb", "", 1),
        ("24gb", "", 1),
        ("48gb", "", 1),
        ("85gb_72b", "", 1),
        ("85gb_72b", "", 2),
        ("85gb_72b", "", 4),
    )
)
"""Run configuration and words: 0.5B to 3B, 7B (4 bits, then 8), 14B, 32B, 72B; then rows of a forward."""
_SERVED_ROWS, _SERVED_LEN = 8, 4096
_CPU_ROWS, _CPU_LEN = 4, 256
"""Of the smallest model."""
_BASES: dict[str, str] = {"int8": "8-bit bases", "nf4": "NF4 bases (QLoRA)"}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    model: str
    batch_size: int
    """Rows of one forward (and backward)."""
    seq_len: int
    """Tokens per row."""
    precision: str
    attention: str
    """The attention kernel that computes it."""
    optimizations: tuple[str, ...]
    device: Literal["cuda", "cpu"]
    predicted_gb: float | None
    """Peak, decimal GB, with the CUDA context and without what the allocator loses; None on the CPU: not planned."""
    use: str
    """What to call."""


def recommend_config(vram_gb: float, training: Training | bool = True) -> Recommendation:
    """The largest model that a GPU of `vram_gb` decimal GB trains or serves, with batch, length and optimizations.

        config = recommend_config(vram_gb=get_vram(), training=True)

    `scratch` (or True): all parameters of one of `Efficient`'s sizes, vocabulary 32,000, 4 rows or more.
    `teacher`: the shipped RLT run configuration with the largest teacher that fits.
    `none` (or False): serving a Qwen2.5 with 8 sequences of 4,096 tokens.
    `vram_gb` 0, which is what `get_vram` says without a GPU: the smallest of each kind, on the CPU.

    Raises:
        UserError: a GPU under 4 GB.
    """
    kinds: dict[bool, Training] = {True: "scratch", False: "none"}
    kind = kinds[training] if isinstance(training, bool) else training
    if vram_gb == 0:
        return {"scratch": _scratch_on_cpu, "teacher": _teacher_on_cpu, "none": _serving_on_cpu}[kind]()
    if not vram_gb >= MIN_CARD_GB:
        raise UserError(
            f"a GPU of {vram_gb:g} GB for training={training!r}",
            expected=f"{MIN_CARD_GB:g} GB or more, or 0 for the CPU",
            remedy="recommend_config(vram_gb=0), or ./launch_mono.sh, which trains the embedded model on the CPU",
        )
    return {"scratch": _from_scratch, "teacher": _teacher, "none": _serving}[kind](round(vram_gb * 1e9))


def _from_scratch(gpu_bytes: int) -> Recommendation:
    for name, length, batch in reversed(_SCRATCH_RUNGS):
        for changes in _CHANGES:
            training = FullTraining(shape=_small_shape(name), batch=batch, length=length, **changes)
            made = plan_full_training(training)
            if made.fits(gpu_bytes):
                return _describe_scratch(name, training, made)
    raise AssertionError(f"the lowest rung fits {MIN_CARD_GB} GB")


@functools.cache
def _small_shape(name: str) -> ModelShape:
    return shape_from_config(f"{name}_llm", model_config(SIZES[name], _VOCAB_SIZE).to_dict())


def _describe_scratch(name: str, training: FullTraining, made: FullTrainingPlan) -> Recommendation:
    optimizations = ["mixed precision", *(["checkpointing"] if training.checkpointing else []), training.optimizer]
    steps = [
        f"Efficient.{name}_llm(vocab_size={_VOCAB_SIZE})",
        *(["Efficient.enable_checkpointing(model)"] if training.checkpointing else []),
        f"Efficient.get_optimizer(model, {training.optimizer!r}, lr)",
        "Efficient.mixed_precision(model, optimizer)",
    ]
    return Recommendation(
        model=f"{name}_llm",
        batch_size=training.batch,
        seq_len=training.length,
        precision="bf16 over float32 weights (before Ampere: fp16)",
        attention="sdpa: FlashAttention where no row is padded (before Ampere: memory-efficient)",
        optimizations=tuple(optimizations),
        device="cuda",
        predicted_gb=gb(made.peak_bytes + CUDA_CONTEXT_BYTES.value),
        use=", ".join(steps),
    )


def _scratch_on_cpu() -> Recommendation:
    return Recommendation(
        model="nano_llm",
        batch_size=_CPU_ROWS,
        seq_len=_CPU_LEN,
        precision="float32",
        attention="sdpa",
        optimizations=("adamw",),
        device="cpu",
        predicted_gb=None,
        use=f"Efficient.nano_llm(vocab_size={_VOCAB_SIZE}), Efficient.get_optimizer(model, 'adamw', lr)",
    )


def _teacher(gpu_bytes: int) -> Recommendation:
    for name, words in reversed(_TEACHER_RUNGS):
        config, settings = _planned(name, words)
        made = plan(settings, gpu_bytes)
        if made.fits():
            return _describe_teacher(config, settings, f"{name} {words}", gb(made.max_bytes))
    raise AssertionError(f"the lowest rung fits {MIN_CARD_GB} GB")


@functools.cache
def _planned(name: str, words: str) -> tuple[RunConfig, TeacherSettings]:
    config = load_teacher_config(compose_run_config(name, words.split()))
    return config, teacher_settings(config)


def _describe_teacher(
    config: RunConfig, settings: TeacherSettings, words: str, predicted_gb: float | None
) -> Recommendation:
    optimizations = [
        _BASES.get(settings.precision, settings.precision),
        f"LoRA rank {settings.lora_r}",
        settings.optimizer,
        *(["checkpointing"] if settings.checkpointing != "none" else []),
        *(["student is the teacher's base"] if settings.student is None else []),
    ]
    device: Literal["cuda", "cpu"] = "cuda" if predicted_gb is not None else "cpu"
    kernel = "memory-efficient, since rows are padded" if device == "cuda" else "torch's kernel for the CPU"
    return Recommendation(
        model=config.model_name_or_path,
        batch_size=settings.micro_batch,
        seq_len=settings.row_len,
        precision=f"{_BASES.get(settings.precision, settings.precision)}, {config.model_args.torch_dtype} products",
        attention=f"{config.model_args.attn_implementation}: {kernel}",
        optimizations=tuple(optimizations),
        device=device,
        predicted_gb=predicted_gb,
        use=f"./launch_mono.sh {words}",
    )


def _teacher_on_cpu() -> Recommendation:
    config, settings = _planned("teacher_rlt_tiny", "")
    return _describe_teacher(config, settings, "teacher_rlt_tiny", None)


def _serving(gpu_bytes: int) -> Recommendation:
    precisions: tuple[tuple[Precision, str], ...] = (
        ("bf16", "bf16"),
        ("int8", "8-bit weights"),
        ("nf4", "NF4 weights"),
    )
    for shape in sorted(_served_shapes(), key=lambda shape: -shape.num_params):
        for precision, words in precisions:
            needed = _serving_bytes(shape, precision)
            if needed <= usable_bytes(gpu_bytes):
                return _describe_serving(shape, words, gb(needed))
    raise AssertionError(f"the smallest model fits {MIN_CARD_GB} GB")


def _served_shapes() -> list[ModelShape]:
    return [known_shapes()[hub_id.lower()] for hub_id in model_sizes("Qwen2.5").values()]


def _describe_serving(shape: ModelShape, precision: str, predicted_gb: float | None) -> Recommendation:
    device: Literal["cuda", "cpu"] = "cuda" if predicted_gb is not None else "cpu"
    return Recommendation(
        model=shape.name,
        batch_size=_SERVED_ROWS,
        seq_len=_SERVED_LEN,
        precision=precision,
        attention="FlashAttention in vLLM, sdpa in transformers" if device == "cuda" else "sdpa",
        optimizations=(precision,),
        device=device,
        predicted_gb=predicted_gb,
        use=f"transformers or vLLM with {shape.name}",
    )


def _serving_on_cpu() -> Recommendation:
    shape = min(_served_shapes(), key=lambda shape: shape.num_params)
    return _describe_serving(shape, "bf16", None)


def _serving_bytes(shape: ModelShape, precision: Precision) -> float:
    kv_cache = _SERVED_ROWS * _SERVED_LEN * kv_bytes_per_token(shape)
    logits = 2 * 4 * _SERVED_ROWS * shape.vocab
    return weight_bytes(shape, precision) + kv_cache + logits + CUDA_CONTEXT_BYTES.value
