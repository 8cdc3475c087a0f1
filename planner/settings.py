"""What a plan depends on, apart from the card; and how to read it off a run configuration."""

import os
from dataclasses import dataclass
from typing import Literal

from core.errors import UserError
from planner.constants import SCORE_BATCH_TOKENS
from planner.shapes import ModelShape, load_shape
from schemas.run import RunConfig

Precision = Literal["fp32", "bf16", "fp8", "int8", "int8_groups", "nf4"]
Checkpointing = Literal["none", "layers", "layers_offloaded"]
Attention = Literal["flash", "masked_sdpa", "eager"]

ATTENTION: dict[str, Attention] = {
    "sdpa": "masked_sdpa",
    "eager": "eager",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
}
DTYPE_PRECISION: dict[str, Precision] = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """One run as the memory arithmetic sees it. Lengths in tokens, batch sizes in completions."""

    teacher: ModelShape
    student: ModelShape | None
    """None: the teacher's own base, adapter off."""
    reference: Literal["none", "shared", "separate"]
    """Separate: one more copy of the teacher's base."""
    precision: Precision
    """Of the teacher's base."""
    scoring_precision: Precision | None = None
    """Of a student and a reference of their own; None: that of the teacher."""
    double_quant: bool = True
    """NF4 only: the scales are quantised too."""
    lora_r: int = 32
    lora_targets: tuple[str, ...] = ()
    """Names of `ModelShape.linears`; empty: all of them."""
    adapter_bytes_per_param: int = 4
    """fp32: at the learning rates of this project an update of a bf16 adapter would round to nothing."""
    num_adapters: int = 1
    """2 where a frozen second adapter is the reference."""
    optimizer: str = "adamw_8bit"
    generator: Literal["vllm", "transformers", "server"] = "vllm"
    generator_precision: Precision = "int8"
    enforce_eager: bool = False
    vllm_utilization_frac: float = 0.9
    """Cap of vLLM's weights, workspace and KV cache together, as a share of the card."""
    kv_cache_bytes: int | None = None
    """None: what the batch needs, within what the card leaves."""
    micro_batch: int
    """Rows of full length in one training forward."""
    train_tokens: int | None = None
    """Padded tokens of one training forward, where they are set apart from `micro_batch`."""
    train_batch: int
    """Completions per optimizer step."""
    num_generations: int
    aggregation_steps: int
    """Prompt groups that are generated at once."""
    max_prompt_len: int
    max_completion_len: int
    checkpointing: Checkpointing = "layers"
    int8_inputs_released: bool = True
    """The int8 linears drop their inputs (optimization/bitsandbytes_patches.py); False: stock bitsandbytes."""
    int8_threshold: float = 6.0
    full_logits: bool = False
    """The head's [tokens, vocabulary] logits are materialised in the training step."""
    attention: Attention = "masked_sdpa"
    """`flash`: no mask is needed, since rows are padded at their ends (sdpa's flash kernel, or Flash Attention);
    `masked_sdpa`: sdpa with a [rows, length, length] mask and keys repeated per query head (packed samples)."""
    expandable_segments: bool = False
    mlp_tile_tokens: int | None = None
    """MLPs run on this many tokens at a time (optimization/memory_optim.py); None: on all of them."""
    kv_bytes_per_value: int = 2
    """Of vLLM's cache: 16 bits, or 1 for fp8."""

    @property
    def row_len(self) -> int:
        return self.max_prompt_len + self.max_completion_len

    @property
    def micro_batch_tokens(self) -> int:
        """Padded tokens of one training forward: rows of any length that fit are taken together."""
        return self.train_tokens if self.train_tokens is not None else self.micro_batch * self.row_len

    @property
    def score_batch_tokens(self) -> int:
        """Padded tokens of one scoring forward, for every role; a row of full length goes alone."""
        return max(int(SCORE_BATCH_TOKENS.value), self.row_len)

    @property
    def scored_in(self) -> Precision:
        """Precision of a student and a reference of their own."""
        return self.scoring_precision or self.precision

    @property
    def num_groups_at_once(self) -> int:
        return min(self.aggregation_steps, self.train_batch // self.num_generations)


def settings_from_config(config: RunConfig, *, allow_download: bool = False) -> PlanSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: a model's shape is not known (`planner.shapes.load_shape`).
    """
    args, grpo = config.model_args, config.grpo
    teacher = load_shape(config.model_name_or_path, allow_download=allow_download)
    student = load_shape(config.student_model, allow_download=allow_download) if config.student_model else None
    precision: Precision = (
        "int8" if args.load_in_8bit else "nf4" if args.load_in_4bit else DTYPE_PRECISION[args.torch_dtype]
    )
    generator_precision: Precision = precision if config.generator_weights == "auto" else config.generator_weights
    if generator_precision == "nf4":
        # models/export.py writes NF4 values as int8 in groups of 64 or 32, and in 16 bits where these do not divide.
        uneven = any(n_in % 32 for n_in, _ in teacher.linears.values())
        generator_precision = "bf16" if uneven else "int8_groups"
    uses_reference = grpo.beta != 0
    frozen_adapter = (
        uses_reference and config.reference_model == "shared" and bool(grpo.sync_ref_model or args.adapter_path)
    )
    return PlanSettings(
        teacher=teacher,
        student=student,
        reference=config.reference_model if uses_reference else "none",
        precision=precision,
        scoring_precision="fp8" if config.scoring_weights == "fp8" else None,
        double_quant=args.bnb_4bit_use_double_quant,
        lora_r=args.lora_r,
        lora_targets=adapter_targets(teacher, args.lora_target_modules),
        num_adapters=2 if frozen_adapter else 1,
        optimizer=str(grpo.optim),
        generator=_generator(config),
        generator_precision=generator_precision,
        enforce_eager=config.vllm_enforce_eager,
        vllm_utilization_frac=grpo.vllm_gpu_memory_utilization,
        kv_cache_bytes=None if config.kv_cache_gb == "auto" else round(config.kv_cache_gb * 1e9),
        micro_batch=grpo.per_device_train_batch_size,
        train_tokens=None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens,
        train_batch=config.train_batch_size,
        num_generations=grpo.num_generations,
        aggregation_steps=config.generation_aggregation_steps,
        max_prompt_len=config.max_prompt_length,
        max_completion_len=grpo.max_completion_length,
        checkpointing=_checkpointing(config),
        int8_threshold=args.llm_int8_threshold,
        attention="eager" if args.attn_implementation == "eager" else "flash",
        expandable_segments=config.expandable_segments
        or "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""),
        mlp_tile_tokens=config.mlp_tile_tokens,
        kv_bytes_per_value=1 if config.kv_cache_dtype == "fp8" else 2,
    )


def _checkpointing(config: RunConfig) -> Checkpointing:
    if not config.grpo.gradient_checkpointing:
        return "none"
    return "layers_offloaded" if config.offload_checkpoints else "layers"


def _generator(config: RunConfig) -> Literal["vllm", "transformers", "server"]:
    """`auto` plans for vLLM: it is the larger of the two, and what a GPU machine gets."""
    if config.use_vllm_server:
        return "server"
    return "transformers" if config.generator == "transformers" else "vllm"


def adapter_targets(shape: ModelShape, modules: str | list[str]) -> tuple[str, ...]:
    if modules == "all-linear":
        return ()
    names = [modules] if isinstance(modules, str) else modules
    if unknown := [name for name in names if name not in shape.linears]:
        raise UserError(
            f"model_args.lora_target_modules names {', '.join(unknown)}",
            expected="`all-linear` or some of " + ", ".join(shape.linears),
            remedy="use the names of the linear layers of a block",
        )
    return tuple(names)
