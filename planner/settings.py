"""PlanSettings: what every plan depends on apart from the GPU; one class per method derives from it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from core.errors import UserError
from core.types import Phase
from planner.constants import SCORE_BATCH_TOKENS
from planner.shapes import ModelShape
from schemas.any_run import AnyRunConfig, TrainingRunConfig
from schemas.methods import as_training

if TYPE_CHECKING:
    from planner.plan import MemoryPlan
    from planner.rates import Rates
    from planner.time import Lengths
    from planner.work import Work

Precision = Literal["fp32", "bf16", "fp8", "int8", "int8_groups", "nf4"]
Checkpointing = Literal["none", "layers", "layers_offloaded"]
SequenceLayout = Literal["shared_prefix", "packed", "padded"]
Attention = Literal["flash", "masked_sdpa", "eager"]

ATTENTION: dict[str, Attention] = {
    "sdpa": "masked_sdpa",
    "eager": "eager",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
}
DTYPE_PRECISION: dict[str, Precision] = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Described:
    """A run's models and batch as tables of plans show them."""

    models: str
    rows: str
    """Of an optimizer step."""
    student: str
    reference: str
    student_name: str | None
    """Of a student of its own."""
    num_generations: int
    """Rows of one prompt."""


Change = tuple[str, dict[str, Any]]
"""In words, and as settings."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ABC):
    """One run as the memory arithmetic sees it. Lengths in tokens, batch sizes in rows."""

    teacher: ModelShape
    """The network that is trained."""
    precision: Precision
    """Of its base."""
    double_quant: bool = True
    """NF4 only: the scales are quantised too."""
    trains: bool = True
    """False: the run samples and scores only, and has no gradients, optimizer states or TRAIN phase."""
    lora_r: int = 32
    lora_targets: tuple[str, ...] = ()
    """Names of `ModelShape.linears`; empty: all of them."""
    adapter_bytes_per_param: int = 4
    """fp32: at the learning rates of this project an update of a bf16 adapter would round to nothing."""
    optimizer: str = "adamw_8bit"
    micro_batch: int
    """Rows of full length in one training forward."""
    train_tokens: int | None = None
    """Padded tokens of one training forward, where they are set apart from `micro_batch`."""
    train_batch: int
    """Rows per optimizer step."""
    max_prompt_len: int
    max_completion_len: int
    checkpointing: Checkpointing = "layers"
    int8_inputs_released: bool = True
    """The int8 linears drop their inputs (optimization/bitsandbytes_patches.py); False: stock bitsandbytes."""
    int8_matmul: Literal["dequantize", "llm_int8"] = "dequantize"
    """int8 only: the product is in 16 bits (optimization/int8_matmul.py), or LLM.int8's."""
    int8_threshold: float = 6.0
    full_logits: bool = False
    """The head's [tokens, vocabulary] logits are materialised in the training step."""
    tiled_head: bool = False
    """The training step's head is TRL's, which works on tiles of the logits (`components.head_tile_bytes`)."""
    attention: Attention = "masked_sdpa"
    """`flash`: no mask is needed, since rows are padded at their ends (sdpa's flash kernel, or Flash Attention);
    `masked_sdpa`: sdpa with a [rows, length, length] mask and keys repeated per query head (packed samples)."""
    expandable_segments: bool = False
    sequence_layout: SequenceLayout = "shared_prefix"
    """How rows are laid out in a forward (rollout/batches.py); time alone depends on it."""
    num_steps: int | None = None
    """Optimizer steps of the run; None: as many as the dataset makes."""
    mlp_tile_tokens: int | None = None
    """MLPs run on this many tokens at a time (optimization/memory_optim.py); None: on all of them."""

    @property
    def quantises_activations(self) -> bool:
        """Products of the base round their activations to int8."""
        return self.precision == "int8" and self.int8_matmul == "llm_int8"

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

    @abstractmethod
    def plan(self, gpu_bytes: int | None) -> "MemoryPlan":
        """Bytes per phase and component; pure arithmetic."""

    def step_work(self, lengths: "Lengths", rates: "Rates") -> "Mapping[Phase, Sequence[Work]]":
        """What an optimizer step computes in each phase; empty: this method has no plan of time."""
        return {}

    @abstractmethod
    def described(self) -> Described:
        """Models and batch in words."""

    @abstractmethod
    def changes(self) -> Iterator[Change]:
        """Changes that save memory, the least costly in quality first; some may not suit the run."""

    @abstractmethod
    def written_bytes(self, num_checkpoints: int) -> float:
        """Bytes that the run writes to disk: checkpoints, and an export for a generator."""

    @property
    def has_vllm(self) -> bool:
        """Whether a vLLM in this process samples."""
        return False

    @property
    def layer_input_width(self) -> int:
        """Bytes of a value of the layer inputs that checkpointing keeps."""
        return 2

    def with_model(self, shape: ModelShape) -> Self | None:
        """The same run of another known model; None where it has a network of its own kind."""
        return None


def common_settings(config: AnyRunConfig, shape: ModelShape) -> dict[str, Any]:
    """Settings that are read from a run configuration of any method; `shape` is that of the main network.

    `micro_batch` and `train_batch` are those of a training; a method that trains nothing gives its own.
    """
    args = config.model_args
    training = as_training(config)
    of_a_step = _settings_of_a_step(training) if training is not None else {"checkpointing": "none", "trains": False}
    return of_a_step | {
        "teacher": shape,
        "precision": "int8" if args.load_in_8bit else "nf4" if args.load_in_4bit else DTYPE_PRECISION[args.torch_dtype],
        "double_quant": args.bnb_4bit_use_double_quant,
        "lora_r": args.lora_r,
        "lora_targets": adapter_targets(shape, args.lora_target_modules),
        "int8_matmul": args.int8_matmul,
        "int8_threshold": args.llm_int8_threshold,
        "expandable_segments": config.expandable_segments
        or "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "mlp_tile_tokens": config.mlp_tile_tokens,
        "sequence_layout": _sequence_layout(config),
    }


def _sequence_layout(config: AnyRunConfig) -> SequenceLayout:
    """`auto` is `shared_prefix` where attention is transformers' sdpa (models/load.py)."""
    asked = config.model_args.sequence_layout
    if asked != "auto":
        return asked
    return "shared_prefix" if config.model_args.attn_implementation == "sdpa" else "padded"


def _settings_of_a_step(config: TrainingRunConfig) -> dict[str, Any]:
    return {
        "micro_batch": config.arguments.per_device_train_batch_size,
        "train_batch": config.train_batch_size,
        "checkpointing": _checkpointing(config),
        "num_steps": config.arguments.max_steps if config.arguments.max_steps > 0 else None,
    }


def _checkpointing(config: TrainingRunConfig) -> Checkpointing:
    if not config.arguments.gradient_checkpointing:
        return "none"
    return "layers_offloaded" if config.offload_checkpoints else "layers"


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
