"""Settings of the models on the GPU: which ones, in what precision, with what adapter."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from schemas.values import Name, NotEmpty, NotNegativeFloat

EMBEDDED_MODEL = "tiny"
"""The model name that stands for the embedded model, made locally on first use."""
_EMBEDDED_STUDENT = re.compile(r"tiny_student(?:_(\d{1,9}))?")


def embedded_student_seed(name: str) -> int | None:
    """The seed of an embedded weak student, `tiny_student_SEED`; `tiny_student` has seed 0. None: another model."""
    found = _EMBEDDED_STUDENT.fullmatch(name)
    return int(found[1] or 0) if found is not None else None


def is_embedded(name: str) -> bool:
    """Whether a model name stands for one that is made locally on first use."""
    return name == EMBEDDED_MODEL or embedded_student_seed(name) is not None


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Section `model_args`: how every model of the run is loaded, and the teacher's LoRA adapter."""

    load_in_8bit: bool = False
    """Base weights as bitsandbytes LLM.int8 has them: one byte per weight, one scale per output row."""
    load_in_4bit: bool = False
    """Base weights as bitsandbytes NF4 with double quantisation (QLoRA)."""
    int8_matmul: Literal["dequantize", "llm_int8"] = "dequantize"
    """Product of 8-bit weights: each widened to 16 bits as it is used (the generator's function), or LLM.int8's own."""
    llm_int8_threshold: NotNegativeFloat = 6.0
    """`int8_matmul: llm_int8`: activation columns above this are multiplied in 16 bits; 0 multiplies all in int8."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the 4-bit scales too (0.37 bit per weight less)."""
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the weights that are not quantised, and of the activations."""
    device_map: str | None = "auto"
    """`auto` puts every model on the one GPU, or on the CPU where there is none; `cpu` and `cuda:N` force it."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention kernel of the trained and scored models."""
    sequence_layout: Literal["auto", "shared_prefix", "packed", "padded"] = "auto"
    """Rows of a scoring or training forward: one after another without padding, a group's common prefix once
    (`shared_prefix`); without padding (`packed`); each as long as the longest (`padded`). The numbers are the same.
    `auto`: `shared_prefix` with `attn_implementation: sdpa`, `padded` where a model's attention cannot be packed."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model repository. Off unless you set it."""
    lora_r: Annotated[int, Field(ge=1, le=512)] = 32
    """Rank of the LoRA adapter; vLLM serves none above 512."""
    lora_alpha: Annotated[int, Field(ge=1, le=2**20)] = 64
    """LoRA scale numerator: the update is `lora_alpha / lora_r * B @ A`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training; above 0 the policy that trains is not the one that sampled."""
    lora_target_modules: Name | NotEmpty[Name] = "all-linear"
    """Linear layers that get an adapter: `all-linear` (all but the head) or names such as `[q_proj, v_proj]`."""
    adapter_path: Name | None = None
    """Start from this saved adapter (its rank and targets win) instead of a zero one."""

    @property
    def quantisation(self) -> Literal["int8", "nf4"] | None:
        """Of the linears of a base; None: they are in `torch_dtype`."""
        return "int8" if self.load_in_8bit else "nf4" if self.load_in_4bit else None

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError(
                "`model_args.load_in_8bit` and `model_args.load_in_4bit` are both true; a base has one precision. "
                "Set one of them to false."
            )
        if self.device_map is not None and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device_map):
            raise ValueError(
                f"`model_args.device_map` is {self.device_map!r}. Use auto (or null), cpu, cuda or cuda:N; a run is on "
                "one device."
            )


def check_trained_weights(trainable_weights: Literal["adapter", "all"], args: ModelArgs, *, use_muon: bool) -> None:
    """
    Raises:
        ValueError: these weights cannot be trained on such a base, or not with this optimizer.
    """
    if use_muon and trainable_weights == "adapter":
        raise ValueError("`use_muon` is for whole matrices, and `trainable_weights` is adapter. Set use_muon=false.")
    if args.quantisation is not None and trainable_weights == "all":
        raise ValueError(
            "`trainable_weights` is all with a quantised base, whose weights take no gradient. Set "
            "trainable_weights=adapter, or model_args.load_in_8bit=false and model_args.load_in_4bit=false."
        )
    if args.adapter_path is not None and trainable_weights == "all":
        raise ValueError(
            "`model_args.adapter_path` is set, and `trainable_weights` is all, without an adapter. Set "
            "trainable_weights=adapter, or leave adapter_path out."
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The models by name."""

    model_name_or_path: Name
    """Teacher: hub id or local folder. `tiny` is the embedded model and `tiny_student_SEED` a weak student for it,
    both made locally on first use."""
    student_model: Name | None = None
    """Student whose likelihood of the solution is the reward; null: the teacher's own base without its adapter."""
    student_parking: Literal["auto", "none", "host"] = "auto"
    """Keep a student of its own in host memory outside scoring; `auto`: where the GPU is too small for all at once."""
    reference_model: Literal["shared", "separate"] = "shared"
    """`shared`: the teacher's own base with the adapter off (0 GB); `separate`: one more copy of the base."""
    scoring_weights: Literal["auto", "fp8"] = "auto"
    """Weights of a student and a reference of their own: as `model_args` says, or fp8 with one scale per output row."""
    model_args: ModelArgs = field(default_factory=ModelArgs)
    """How they are loaded."""
