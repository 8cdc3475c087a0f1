"""Memory of supervised fine-tuning: one model, no generator; the head is read where a token is learned.

A row may be learned almost whole, so the worst step has as many learned tokens as a forward has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from core.types import Phase
from planner.activations import dynamic_components, forward_bytes, train_activation_bytes
from planner.changes import batch_changes, precision_changes, smaller_model
from planner.components import (
    adapter_checkpoint_bytes,
    head_tile_bytes,
    num_lora_params,
    weight_bytes,
)
from planner.constants import CUDA_CONTEXT_BYTES, HEAD_TILE_COLUMNS
from planner.masked_diffusion import kept_per_token, optimizer_state_bytes
from planner.plan import MemoryPlan, memory_plan
from planner.rates import Rates
from planner.settings import Change, Described, PlanSettings, common_settings
from planner.shapes import ModelShape, load_shape
from planner.time import Lengths
from planner.work import Rows, Work, training_work
from schemas.sft import SupervisedRunConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(PlanSettings):
    """One run; `max_completion_len` is the longest row, `teacher` the network that is trained."""

    trains_all: bool
    autocast: bool
    """16-bit arithmetic where the weights have 32 bits."""

    @property
    def layer_input_width(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def plan(self, gpu_bytes: int | None) -> MemoryPlan:
        return memory_plan(self, supervised_components(self), gpu_bytes=gpu_bytes)

    def step_work(self, lengths: Lengths, rates: Rates) -> Mapping[Phase, Sequence[Work]]:
        """With an adapter; the gradients of all weights are one more product of each."""
        rows = Rows(
            num_rows=self.train_batch,
            group=1,
            prefix_len=0.0,
            own_len=lengths.prompt + lengths.completion,
            scored_len=lengths.completion,
            pads=True,
        )
        learned = training_work(
            self.teacher,
            self.precision,
            rows,
            batch_tokens=self.micro_batch_tokens,
            recomputes=self.checkpointing != "none",
            lora_r=0 if self.trains_all else self.lora_r,
        )
        if self.trains_all:
            products = 2.0 * self.teacher.num_params * rows.num_tokens
            learned = replace(learned, flop=learned.flop + products)
        return {Phase.TRAIN: [learned]}

    def described(self) -> Described:
        return Described(
            models=f"supervised fine-tuning of {self.teacher.name} ({self.precision})",
            rows=f"{self.train_batch} rows per step, {self.micro_batch} of full length at once",
            student="none (fine-tuning)",
            reference="none",
            student_name=None,
            num_generations=1,
        )

    def changes(self) -> Iterator[Change]:
        yield from batch_changes(self)
        yield from precision_changes(self)
        if (name := smaller_model(self.teacher)) is not None:
            yield f"model {self.teacher.name} -> {name}", {"model_name_or_path": name}

    def written_bytes(self, num_checkpoints: int) -> float:
        if not self.trains_all:
            return num_checkpoints * adapter_checkpoint_bytes(self)
        num_params, width = _trained(self)
        return num_checkpoints * (num_params * width + optimizer_state_bytes(self, num_params))


def supervised_settings(config: SupervisedRunConfig, *, allow_download: bool = False) -> SupervisedSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: the model's shape is not known (`planner.shapes.load_shape`).
    """
    shape = load_shape(config.model_name_or_path, allow_download=allow_download)
    return SupervisedSettings(
        **common_settings(config, shape),
        optimizer="muon" if config.use_muon else str(config.sft.optim),
        max_prompt_len=0,
        max_completion_len=config.sft.max_length,
        tiled_head=True,
        attention="eager" if config.model_args.attn_implementation == "eager" else "flash",
        trains_all=config.trainable_weights == "all",
        autocast=config.autocasts,
    )


def supervised_components(settings: SupervisedSettings) -> dict[Phase, dict[str, float]]:
    """Bytes per phase and component; SCORE is the held-out loss."""
    shape = settings.teacher
    weights = weight_bytes(shape, settings.precision, double_quant=settings.double_quant)
    loaded = {"teacher": weights, "CUDA context": CUDA_CONTEXT_BYTES.value}
    num_trained, width = _trained(settings)
    if not settings.trains_all:
        loaded["adapter"] = num_trained * width
    resident = loaded | {"optimizer states": optimizer_state_bytes(settings, num_trained)}
    forward = forward_bytes(settings, shape, settings.score_batch_tokens, adapter=not settings.trains_all)
    forward *= settings.layer_input_width / 2  # counted in 16 bits
    training = train_all_activation_bytes(settings) if settings.trains_all else train_activation_bytes(settings)
    return {
        Phase.LOAD: loaded,
        Phase.SCORE: resident | dynamic_components(settings, forward),
        Phase.TRAIN: resident | {"gradients": num_trained * width} | dynamic_components(settings, training),
    }


def _trained(settings: SupervisedSettings) -> tuple[int, int]:
    """Trained parameters, and the bytes of one."""
    shape: ModelShape = settings.teacher
    if settings.trains_all:
        return shape.num_params, 4 if settings.precision == "fp32" else 2
    return num_lora_params(shape, settings.lora_r, settings.lora_targets), settings.adapter_bytes_per_param


def train_all_activation_bytes(settings: SupervisedSettings) -> float:
    """Peak of a micro-batch's forward and backward over weights, gradients and optimizer states, all weights trained.

    Letters as in planner/activations.py. Under autocast every linear keeps a 16-bit copy of its float32 weight: until
    the forward ends where blocks are recomputed, until its backward where they are not.
    """
    shape, num_tokens, width = settings.teacher, settings.micro_batch_tokens, settings.layer_input_width
    h, i, vocabulary = shape.hidden, shape.intermediate, shape.vocab * shape.hidden
    casts = settings.autocast and settings.precision == "fp32"
    act = 2 if casts else width
    weights_cast = 2 * shape.num_linear_params / shape.num_layers if casts else 0
    if settings.precision == "fp32":
        per_token = kept_per_token(shape, autocast=casts)
    else:
        per_token = 16.0 * h + 4 * shape.q_dim + 4 * shape.kv_dim + 8 * i + 4 * shape.num_heads
    layer = per_token * num_tokens + weights_cast
    backward = (2 * act * i + width * h) * num_tokens
    if settings.checkpointing == "none":
        kept, layers = shape.num_layers * layer, shape.num_layers * layer + backward
    else:
        num_on_card = 2 if settings.checkpointing == "layers_offloaded" else shape.num_layers
        kept = float(width * h * num_tokens * num_on_card)
        layers = kept + layer + backward
    # The head's gradient in float32, and as its weight has it; the final norm, and the hidden states that are learned.
    tile = head_tile_bytes(shape, num_tokens, act)
    head_weight = (
        4 * vocabulary + (2 * vocabulary if width == 2 else 0) + (2 * HEAD_TILE_COLUMNS.value * h if casts else 0)
    )
    head = kept + tile + head_weight + (14.0 if width == 2 else 17.0) * h * num_tokens
    # The gradients of head and embedding; where they are one matrix, their sum too.
    embedding_gradients = float((3 if shape.tied_embeddings else 2) * width * vocabulary)
    return max(layers, head, embedding_gradients)
