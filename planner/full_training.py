"""Memory of a step that trains every parameter (no adapter, no generator): small models from scratch.

Each moment is a sum of the tensors that are alive then; `tests/test_efficient_memory.py` holds it against the storages
of real steps. Letters as in planner/activations.py: h hidden, i intermediate, q and kv widths of queries and keys,
V vocabulary, T = batch * length tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from core.units import gb, sizes_line
from planner.components import muon_state_bytes, optimizer_bytes_per_param
from planner.constants import CUDA_CONTEXT_BYTES, FRAGMENTATION_FRAC, usable_bytes
from planner.shapes import ModelShape

TrainingPrecision = Literal["fp32", "bf16", "mixed"]
APOLLO_RANK = 128
"""Rank of Apollo's low-rank Adam, the library's own choice for pre-training."""

_NUM_STEP_COPIES = {"apollo": 2}
"""Copies of the largest gradient that an optimizer's step makes; fused and bitsandbytes' ones make none."""


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    """One optimizer step over `batch` rows of `length` tokens with transformers' own loss."""

    shape: ModelShape
    batch: int
    length: int
    precision: TrainingPrecision = "mixed"
    """`mixed`: float32 weights under 16-bit autocast; `bf16`: weights, gradients and activations in 16 bits."""
    optimizer: str = "adamw"
    """A name of `optimization.optimizers.OPTIMIZERS`."""
    checkpointing: bool = False

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, kw_only=True, repr=False)
class FullTrainingPlan(Mapping[str, float]):
    """Allocated bytes of a step. Nothing here was measured.

    As a mapping it has decimal GB: `model`, `activations`, `gradients` and `optimizer` add up to `total`, the peak.
    `model`, `gradients` and `optimizer` are their whole sizes; `activations` is what the peak takes beyond the three
    (a gradient's memory is activations' before and after, so what is alive at one moment is in `moments`).
    """

    weights_bytes: int
    gradients_bytes: int
    """All gradients at once; of one parameter for an optimizer that updates in backward."""
    optimizer_bytes: int
    moments: Mapping[str, int]
    """Moment of the step -> bytes of gradients and activations that are alive then."""

    @property
    def binding_moment(self) -> str:
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.optimizer_bytes + self.moments[self.binding_moment]

    def _sizes_gb(self) -> dict[str, float]:
        activations = self.moments[self.binding_moment] - self.gradients_bytes
        parts = (self.weights_bytes, activations, self.gradients_bytes, self.optimizer_bytes, self.peak_bytes)
        names = ("model", "activations", "gradients", "optimizer", "total")
        return {name: gb(size) for name, size in zip(names, parts, strict=True)}

    def __getitem__(self, name: str) -> float:
        return self._sizes_gb()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes_gb())

    def __len__(self) -> int:
        return len(self._sizes_gb())

    def __repr__(self) -> str:
        return f"{sizes_line(self)} (predicted; peak: {self.binding_moment})"

    def fits(self, gpu_bytes: int) -> bool:
        """Whether the usable share of a GPU holds it, CUDA context and allocator overhead included."""
        overhead = CUDA_CONTEXT_BYTES.value + FRAGMENTATION_FRAC.value * self.moments[self.binding_moment]
        return self.peak_bytes + overhead <= usable_bytes(gpu_bytes)


def plan_full_training(training: FullTraining) -> FullTrainingPlan:
    shape, width = training.shape, training.bytes_per_weight
    num_tokens = training.batch * training.length
    embedding = shape.vocab * shape.hidden * width
    is_fused = training.optimizer == "adalomo"  # updates in backward: the gradient of one parameter at a time
    gradients = embedding if is_fused else shape.num_params * width
    layer = _layer_kept_per_token(training) * num_tokens
    layer_weights = 2 * (shape.num_linear_params // shape.num_layers) if training.precision == "mixed" else 0
    moment = layer + layer_weights + _backward_per_token(training) * num_tokens
    kept: float
    if training.checkpointing:
        kept = shape.num_layers * _stream_width(training) * shape.hidden * num_tokens
        layers = kept + moment
    else:
        kept = shape.num_layers * (layer + layer_weights)
        layers = kept + _backward_per_token(training) * num_tokens
    cast_head = 2 * shape.vocab * shape.hidden if training.precision == "mixed" else 0
    moments = {
        # float32 log-softmax, the gradient of the likelihood and that of the logits
        "loss": kept + _norm_kept(training) * num_tokens + cast_head + 12 * shape.vocab * num_tokens,
        "first layer backward": layers + embedding,
        "last layer backward": moment + gradients,
        # the two gradients of a tied embedding are summed into a third tensor
        "update": gradients
        + embedding * ((2 if shape.tied_embeddings else 0) + _NUM_STEP_COPIES.get(training.optimizer, 0)),
    }
    return FullTrainingPlan(
        weights_bytes=shape.num_params * width,
        gradients_bytes=gradients,
        optimizer_bytes=round(optimizer_state_bytes(training)),
        moments={name: round(size) for name, size in moments.items()},
    )


def optimizer_state_bytes(training: FullTraining) -> float:
    """States of the optimizer; factored ones (Adafactor, AdaLomo) keep two vectors per matrix, counted as none."""
    shape, name = training.shape, training.optimizer
    if name == "adalomo":
        return 0.0
    if name == "apollo":  # two float32 moments of rank x the longer side, and the projection of rank x the shorter
        sides = [*shape.linears.values()] * shape.num_layers + [(shape.vocab, shape.hidden)]
        return float(sum(min(APOLLO_RANK, *side) * (2 * 4 * max(side) + 4 * min(side)) for side in sides))
    if name == "muon":
        return muon_state_bytes(shape)
    per_param = optimizer_bytes_per_param(name)
    if training.precision == "bf16" and name == "adamw":
        per_param /= 2  # torch keeps its states in the parameter's dtype
    return shape.num_params * per_param


def _stream_width(training: FullTraining) -> int:
    """Bytes of one value of the residual stream."""
    return 2 if training.precision == "bf16" else 4


def _norm_kept(training: FullTraining) -> float:
    """Bytes per token that a norm keeps: float32 input, normalised values; its output counts with its reader."""
    return (4 + _stream_width(training)) * training.shape.hidden


def _layer_kept_per_token(training: FullTraining) -> float:
    """Two norms; the inputs of the linears; q, k, v; gate, silu, up.

    Under autocast q, k, v (and gate, up) each keep a 16-bit copy of their common input.
    """
    shape = training.shape
    h, i, q, kv = shape.hidden, shape.intermediate, shape.q_dim, shape.kv_dim
    act = 4 if training.precision == "fp32" else 2
    num_norm_outputs = 5 if training.precision == "mixed" else 2
    log_sum_exp = 4 * shape.num_heads
    return 2 * _norm_kept(training) + act * (num_norm_outputs * h + 2 * q + 2 * kv + 4 * i) + log_sum_exp


def _backward_per_token(training: FullTraining) -> float:
    """The gradients of up and of silu(gate), and of the residual stream."""
    act = 4 if training.precision == "fp32" else 2
    return act * 2 * training.shape.intermediate + _stream_width(training) * training.shape.hidden
