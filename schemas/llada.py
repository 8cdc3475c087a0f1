"""Settings of masked-diffusion language models (LLaDA, arXiv 2502.09992) and the configuration of such a run."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.any_run import TrainingRunConfig
from schemas.model import ModelArgs, check_trained_weights
from schemas.optimization import OptimizationConfig
from schemas.values import CountingInt, Name, PositiveInt

PUBLISHED_SETTINGS = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
"""A setting's name in config.json of the published LLaDA checkpoints -> transformers' name."""


@dataclass(frozen=True, kw_only=True)
class NewModelShape:
    """Section `new_model`: the network that is made where training starts from scratch."""

    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's tokens and one more for the mask, unless it has one."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width of the gated MLP."""
    num_hidden_layers: PositiveInt
    """Blocks."""
    num_attention_heads: PositiveInt
    """Heads of queries."""
    num_key_value_heads: PositiveInt | None = None
    """Heads of keys and values; null: as many as of queries."""
    max_position_embeddings: PositiveInt = 4096
    """Longest row that the rotary positions are meant for."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 500_000.0
    """Base of the rotary positions; short rows learn sooner with a small one."""
    tie_word_embeddings: bool = False
    """Input embedding and head are one matrix."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`new_model.hidden_size` {self.hidden_size} does not split into {self.num_attention_heads} heads of "
                "an even width. Use a multiple of twice `new_model.num_attention_heads`."
            )
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`new_model.num_attention_heads` {self.num_attention_heads} is not a multiple of "
                f"`new_model.num_key_value_heads` {self.num_key_value_heads}: each of them serves as many queries."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionSamplingConfig:
    """How text is generated: blocks from left to right, within a block the surest tokens first."""

    max_response_length: PositiveInt
    """Tokens that sampling fills; in training the longest response (sft), or piece of text (pretrain)."""
    sampling_steps: PositiveInt
    """Forward passes for a whole response, shared evenly among its blocks; fewer write several tokens at once."""
    block_length: PositiveInt
    """Tokens of a block. A block is finished before the next one starts; `max_response_length`: one block."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predicted tokens are masked again in a step: those of the lowest probability, or any."""
    sampling_temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 takes the likeliest token at each position; above 0 samples from the distribution at that temperature."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Classifier-free guidance w: (1 + w) * logits - w * logits with the prompt masked; 0 is one forward less."""


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionConfig(DiffusionSamplingConfig):
    method: Literal["masked_diffusion"]
    """What the run trains: `rlt` (a teacher; the default) or `masked_diffusion`."""
    objective: Literal["sft", "pretrain"]
    """`sft` masks the response only and never the prompt; `pretrain` masks the whole text."""
    model_name_or_path: Name | None = None
    """Where training starts: a hub id such as GSAI-ML/LLaDA-8B-Base, or a local folder; null: from scratch."""
    new_model: NewModelShape | None = None
    """Network to start from scratch with."""
    tokenizer_name_or_path: Name | None = None
    """Tokenizer where the model brings none (from scratch); `tiny` is the embedded one."""
    trainable_weights: Literal["adapter", "all"]
    """A LoRA adapter on frozen weights, or every weight (not with quantised ones)."""
    use_muon: bool = False
    """Train the blocks' matrices with Muon and the rest with AdamW, instead of `optim`; the embedded task needs it."""
    model_args: ModelArgs = field(default_factory=ModelArgs)
    """How the model is loaded."""
    packing: bool = False
    """Several samples in a row, which neither attend to each other nor count each other's positions."""
    response_multiple: PositiveInt = 1
    """sft: responses are filled with end-of-text tokens, which are learned, to a multiple of this many tokens."""
    num_likelihood_samples: PositiveInt = 32
    """Maskings of each held-out row for the likelihood bound; the paper takes 128."""
    num_sampled_prompts: CountingInt = 64
    """sft: held-out prompts, at most `num_eval_prompts`, whose sampled responses are compared with the solution."""


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionRunConfig(MaskedDiffusionConfig, TrainingRunConfig):
    """One run that trains a masked-diffusion model."""

    args: Any
    """transformers' own settings (TrainingArguments field -> value), with its defaults where nothing is said."""

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self.model_args)
        OptimizationConfig.__post_init__(self)
        _check_model(self)
        _check_lengths(self)
        self.check_whole_accumulation()

    @property
    def arguments(self) -> Any:
        return self.args

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return self.model_name_or_path, self.tokenizer_name_or_path

    @property
    def no_vllm(self) -> str | None:
        return "masked diffusion samples with the model itself"

    @property
    def packs_rows(self) -> bool:
        return self.packing

    @classmethod
    def sections(cls) -> dict[str, type]:
        return super().sections() | {"new_model": NewModelShape}

    @property
    def row_length(self) -> int:
        """Tokens of the longest row that is trained on."""
        return self.max_response_length + (self.max_prompt_length if self.objective == "sft" else 0)


def _check_model(config: MaskedDiffusionRunConfig) -> None:
    if (config.model_name_or_path is None) == (config.new_model is None):
        raise ValueError(
            "set one of `model_name_or_path` (continue from a model) and `new_model` (start from scratch), and leave "
            "the other null."
        )
    if config.new_model is not None:
        NewModelShape.__post_init__(config.new_model)
        if config.tokenizer_name_or_path is None:
            raise ValueError("`new_model` comes without a tokenizer. Set tokenizer_name_or_path=HUB_ID_OR_FOLDER.")
        if config.trainable_weights == "adapter":
            raise ValueError(
                "`trainable_weights` is adapter with a new model, whose weights are random. Set it to all."
            )
    check_trained_weights(config.trainable_weights, config.model_args, use_muon=config.use_muon)
    if config.model_args.sequence_layout != "auto":
        raise ValueError(
            f"`model_args.sequence_layout` is {config.model_args.sequence_layout}, and `packing` lays out the rows of "
            "masked diffusion. Set model_args.sequence_layout=auto."
        )
    if config.packing and config.model_args.attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"`packing` keeps samples apart with an attention mask, which {config.model_args.attn_implementation} does "
            "not take. Set model_args.attn_implementation=sdpa, or packing=false."
        )


def _check_lengths(config: MaskedDiffusionRunConfig) -> None:
    length, block, steps = config.max_response_length, config.block_length, config.sampling_steps
    if length % block:
        raise ValueError(
            f"`max_response_length` {length} is not a multiple of `block_length` {block}: blocks are whole. Use "
            f"block_length={length} (one block) or another divisor."
        )
    num_blocks = length // block
    if steps % num_blocks or steps > length:
        raise ValueError(
            f"`sampling_steps` {steps} does not split evenly among {num_blocks} blocks of {block} tokens. Use a "
            f"multiple of {num_blocks} up to {length}."
        )
    if length % config.response_multiple:
        raise ValueError(
            f"`max_response_length` {length} is not a multiple of `response_multiple` {config.response_multiple}: a "
            "filled response must fit. Use a divisor."
        )
    if config.objective == "pretrain" and config.response_multiple > 1:
        raise ValueError("`response_multiple` fills responses, and `objective` pretrain has none. Set it to 1.")
