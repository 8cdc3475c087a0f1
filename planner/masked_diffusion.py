"""Memory of a masked-diffusion run: no KV cache and no second model; the whole row is computed, the head only at masks.

The worst step masks every token that may be masked (t close to 1); of rows that are filled, what t spread over the rows
of a micro-batch leaves. Letters as in planner/activations.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from core.types import Phase
from planner.activations import dynamic_components, forward_bytes, train_activation_bytes
from planner.changes import batch_changes, precision_changes
from planner.components import (
    adapter_checkpoint_bytes,
    muon_state_bytes,
    num_lora_params,
    optimizer_bytes_per_param,
    weight_bytes,
)
from planner.constants import CUDA_CONTEXT_BYTES
from planner.plan import MemoryPlan, memory_plan
from planner.settings import ATTENTION, Attention, Change, Described, PlanSettings, common_settings
from planner.shapes import ModelShape, load_shape
from schemas.llada import MaskedDiffusionRunConfig, NewModelShape


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionSettings(PlanSettings):
    """One run; `max_completion_len` is the longest response, `teacher` the network that is trained."""

    trains_all: bool
    autocast: bool
    """16-bit arithmetic; the weights that are trained keep 32 bits."""
    fills_rows: bool
    """Responses are filled to the longest row, so that nearly a whole row may be masked; each row is one sample."""

    @property
    def num_scored(self) -> int:
        """Most tokens of a micro-batch that are masked at once: the head reads these.

        The masking probabilities of S rows of one length are 1 / S apart, so their mean is at most (S + 1) / 2S.
        """
        if self.fills_rows:
            return self.row_len * (self.micro_batch + 1) // 2
        return self.micro_batch * self.max_completion_len

    @property
    def layer_input_width(self) -> int:
        return 4 if self.trains_all else 2

    def plan(self, gpu_bytes: int | None) -> MemoryPlan:
        return memory_plan(self, masked_diffusion_components(self), gpu_bytes=gpu_bytes)

    def described(self) -> Described:
        return Described(
            models=f"masked diffusion of {self.teacher.name} ({self.precision})",
            rows=f"{self.train_batch} rows per step, {self.micro_batch} at once",
            student="none (masked diffusion)",
            reference="none",
            student_name=None,
            num_generations=1,
        )

    def changes(self) -> Iterator[Change]:
        yield from batch_changes(self)
        yield from precision_changes(self)

    def written_bytes(self, num_checkpoints: int) -> float:
        return num_checkpoints * adapter_checkpoint_bytes(self)


def masked_diffusion_settings(
    config: MaskedDiffusionRunConfig, *, allow_download: bool = False
) -> MaskedDiffusionSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: the model's shape is not known (`planner.shapes.load_shape`).
    """
    if config.new_model is not None:
        shape = new_model_shape(config.new_model)
    else:
        shape = load_shape(str(config.model_name_or_path), allow_download=allow_download)
    return MaskedDiffusionSettings(
        **common_settings(config, shape),
        optimizer="muon" if config.use_muon else str(config.args.optim),
        max_prompt_len=config.row_length - config.max_response_length,
        max_completion_len=config.max_response_length,
        full_logits=True,
        attention=_attention(config),
        trains_all=config.trainable_weights == "all",
        autocast=bool(config.args.bf16),
        fills_rows=config.objective == "sft" and not config.packing,
    )


def _attention(config: MaskedDiffusionRunConfig) -> Attention:
    """sdpa gets a mask where samples are packed and where shorter texts are padded; filled responses need none."""
    kind = ATTENTION[config.model_args.attn_implementation]
    has_mask = config.packing or config.objective == "pretrain"
    return "flash" if kind == "masked_sdpa" and not has_mask else kind


def new_model_shape(new: NewModelShape) -> ModelShape:
    return ModelShape(
        name=f"new model of {new.num_hidden_layers} x {new.hidden_size}",
        hidden=new.hidden_size,
        intermediate=new.intermediate_size,
        num_layers=new.num_hidden_layers,
        num_heads=new.num_attention_heads,
        num_kv_heads=new.num_key_value_heads or new.num_attention_heads,
        head_dim=new.hidden_size // new.num_attention_heads,
        vocab=new.vocab_size,
        tied_embeddings=new.tie_word_embeddings,
        attention_bias=False,
        qk_norm=False,
        max_positions=new.max_position_embeddings,
    )


def masked_diffusion_components(settings: MaskedDiffusionSettings) -> dict[Phase, dict[str, float]]:
    """Bytes per phase and component. GENERATE is sampling and SCORE the likelihood bound, both in evaluations."""
    shape = settings.teacher
    weights = weight_bytes(shape, settings.precision, double_quant=settings.double_quant)
    loaded = {"teacher": weights, "CUDA context": CUDA_CONTEXT_BYTES.value}
    if settings.trains_all:
        num_trained, width = shape.num_params, 4 if settings.precision == "fp32" else 2
    else:
        num_trained, width = num_lora_params(shape, settings.lora_r, settings.lora_targets), 4
        loaded["adapter"] = num_trained * width
    resident = loaded | {"optimizer states": optimizer_state_bytes(settings, num_trained)}
    forward = dynamic_components(settings, _forward_bytes(settings))
    training = train_all_activation_bytes(settings) if settings.trains_all else train_activation_bytes(settings)
    return {
        Phase.LOAD: loaded,
        Phase.GENERATE: resident | forward,
        Phase.SCORE: resident | forward,
        Phase.TRAIN: resident | {"gradients": num_trained * width} | dynamic_components(settings, training),
    }


def optimizer_state_bytes(settings: PlanSettings, num_trained: int) -> float:
    if settings.optimizer == "muon":
        return muon_state_bytes(settings.teacher)
    return num_trained * optimizer_bytes_per_param(settings.optimizer)


def _forward_bytes(settings: MaskedDiffusionSettings) -> float:
    """A forward without gradients and its logits at the masks: in 16 bits, in float32, and their log-softmax."""
    num_scored = settings.num_scored
    blocks = forward_bytes(settings, settings.teacher, settings.micro_batch_tokens, adapter=not settings.trains_all)
    return max(blocks, 10.0 * settings.teacher.vocab * num_scored)


def train_all_activation_bytes(settings: MaskedDiffusionSettings) -> float:
    """Peak of a micro-batch's forward and backward over weights, gradients and optimizer states, all weights trained.

    Under autocast every linear keeps a 16-bit copy of its weight: until the forward ends where blocks are recomputed,
    until its backward where they are not.
    """
    shape, num_tokens = settings.teacher, settings.micro_batch * settings.row_len
    num_scored = settings.num_scored
    h, act = shape.hidden, 2 if settings.autocast else 4
    weights_cast = 2 * shape.num_linear_params / shape.num_layers if settings.autocast else 0
    head_cast = 2 * shape.vocab * h if settings.autocast else 0
    bias = act * settings.micro_batch * settings.row_len**2 if settings.attention == "masked_sdpa" else 0
    layer = kept_per_token(shape, autocast=settings.autocast) * num_tokens + bias + weights_cast
    backward = (2 * act * shape.intermediate + 4 * h) * num_tokens
    if settings.checkpointing == "none":
        kept, layers = shape.num_layers * layer, shape.num_layers * layer + backward
    else:
        kept = 4 * h * num_tokens * shape.num_layers
        layers = kept + layer + backward
    final_norm = 8 * h * num_tokens
    # Log-softmax in float32, its gradient and that of the logits; the hidden states at the masks.
    head = 12 * shape.vocab * num_scored + head_cast + (4 + act) * h * num_scored
    mask = settings.micro_batch * settings.row_len**2 if settings.attention == "masked_sdpa" else 0
    # The loss is computed before autocast gives its 16-bit copies of the weights back.
    loss = 10 * shape.vocab * num_scored + head_cast + shape.num_layers * weights_cast
    # The gradients of head and embedding; where they are one matrix, their sum too.
    embedding_gradients = (12 if shape.tied_embeddings else 8) * shape.vocab * h
    return mask + max(layers, kept + final_norm + max(head, loss), embedding_gradients)


def kept_per_token(shape: ModelShape, *, autocast: bool) -> float:
    """Bytes per token that autograd keeps of a block whose float32 weights are all trained.

    Two norms, the inputs of the linears, q, k, v, gate, silu, up.
    """
    act = 2 if autocast else 4
    h, i, q, kv = shape.hidden, shape.intermediate, shape.q_dim, shape.kv_dim
    num_norm_outputs = 5 if autocast else 2
    return 16 * h + act * (num_norm_outputs * h + 2 * q + 2 * kv + 4 * i) + 4 * shape.num_heads
