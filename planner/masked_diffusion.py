"""Memory of a masked-diffusion run: no KV cache and no second model; the whole row is computed, the head only at masks.

The worst step masks every token that may be masked (t close to 1). Letters as in planner/activations.py.
"""

from dataclasses import dataclass

from core.types import Phase
from planner.activations import forward_bytes, train_activation_bytes
from planner.components import num_lora_params, optimizer_bytes_per_param, weight_bytes
from planner.constants import CUDA_CONTEXT_BYTES, FRAGMENTATION_FRAC
from planner.settings import ATTENTION, DTYPE_PRECISION, Attention, Checkpointing, PlanSettings, adapter_targets
from planner.shapes import ModelShape, load_shape
from schemas.llada import MaskedDiffusionRunConfig, NewModelShape


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionSettings(PlanSettings):
    """One run; `max_completion_len` is the longest response, `teacher` the network that is trained."""

    trains_all: bool
    autocast: bool
    """16-bit arithmetic; the weights that are trained keep 32 bits."""


def masked_diffusion_settings(
    config: MaskedDiffusionRunConfig, *, allow_download: bool = False
) -> MaskedDiffusionSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: the model's shape is not known (`planner.shapes.load_shape`).
    """
    args = config.model_args
    if config.new_model is not None:
        shape = new_model_shape(config.new_model)
    else:
        shape = load_shape(str(config.model_name_or_path), allow_download=allow_download)
    return MaskedDiffusionSettings(
        teacher=shape,
        student=None,
        reference="none",
        precision="int8" if args.load_in_8bit else "nf4" if args.load_in_4bit else DTYPE_PRECISION[args.torch_dtype],
        double_quant=args.bnb_4bit_use_double_quant,
        lora_r=args.lora_r,
        lora_targets=adapter_targets(shape, args.lora_target_modules),
        optimizer=str(config.args.optim),
        generator="transformers",
        micro_batch=config.args.per_device_train_batch_size,
        train_batch=config.train_batch_size,
        num_generations=1,
        aggregation_steps=1,
        max_prompt_len=config.row_length - config.max_response_length,
        max_completion_len=config.max_response_length,
        checkpointing=_checkpointing(config),
        mlp_tile_tokens=config.mlp_tile_tokens,
        expandable_segments=config.expandable_segments,
        int8_threshold=args.llm_int8_threshold,
        full_logits=True,
        attention=_attention(config),
        trains_all=config.trainable_weights == "all",
        autocast=bool(config.args.bf16),
    )


def _checkpointing(config: MaskedDiffusionRunConfig) -> Checkpointing:
    if not config.args.gradient_checkpointing:
        return "none"
    return "layers_offloaded" if config.offload_checkpoints else "layers"


def _attention(config: MaskedDiffusionRunConfig) -> Attention:
    """Rows are full, so sdpa gets a mask only where samples are packed."""
    kind = ATTENTION[config.model_args.attn_implementation]
    return "flash" if kind == "masked_sdpa" and not config.packing else kind


def new_model_shape(new: NewModelShape) -> ModelShape:
    return ModelShape(
        name=f"new model of {new.num_hidden_layers} x {new.hidden_size}",
        hidden=new.hidden_size,
        intermediate=new.intermediate_size,
        num_layers=new.num_hidden_layers,
        num_heads=new.num_attention_heads,
        num_kv_heads=new.num_attention_heads,
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
    resident = loaded | {"optimizer states": num_trained * optimizer_bytes_per_param(settings.optimizer)}
    forward = _dynamic(_forward_bytes(settings))
    training = _train_all_bytes(settings) if settings.trains_all else train_activation_bytes(settings)
    return {
        Phase.LOAD: loaded,
        Phase.GENERATE: resident | forward,
        Phase.SCORE: resident | forward,
        Phase.SYNC: {},
        Phase.TRAIN: resident | {"gradients": num_trained * width} | _dynamic(training),
    }


def _dynamic(activations: float) -> dict[str, float]:
    return {"activations": activations, "allocator": activations * FRAGMENTATION_FRAC.value}


def _forward_bytes(settings: MaskedDiffusionSettings) -> float:
    """A forward without gradients and its logits at the masks: in 16 bits, in float32, and their log-softmax."""
    num_scored = settings.micro_batch * settings.max_completion_len
    blocks = forward_bytes(settings, settings.teacher, settings.micro_batch, adapter=not settings.trains_all)
    return max(blocks, 10.0 * settings.teacher.vocab * num_scored)


def _train_all_bytes(settings: MaskedDiffusionSettings) -> float:
    """Peak of a step that trains every weight, over weights, gradients and optimizer states."""
    shape, num_tokens = settings.teacher, settings.micro_batch * settings.row_len
    num_scored = settings.micro_batch * settings.max_completion_len
    head = 12.0 * shape.vocab * num_scored
    return head + 40.0 * shape.hidden * num_tokens * shape.num_layers
