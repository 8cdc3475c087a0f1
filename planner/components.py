"""Bytes of each thing that lies on the card, one formula each (derivations: docs/memory.md).

Letters: h hidden, i intermediate, L layers, V vocabulary, q and kv the widths of queries and of keys, r LoRA rank,
T tokens of a forward (rows x padded length).
"""

from planner.constants import HEAD_TILE_TOKENS, HEAD_TILE_VOCAB, VLLM_BATCHED_TOKENS, VLLM_SEQUENCES
from planner.settings import PlanSettings, Precision
from planner.shapes import ModelShape

_LINEAR_BYTES: dict[Precision, float] = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "nf4": 0.5}
_NF4_BLOCK = 64

# Optimizer states in bytes per parameter. 8-bit states carry one fp32 scale per 256 values and state.
_8BIT_STATE = 1 + 4 / 256
_OPTIMIZER_STATES = {
    "adamw": (2, 4.0),
    "ademamix": (3, 4.0),
    "lion": (1, 4.0),
    "rmsprop": (1, 4.0),
    "adagrad": (1, 4.0),
    "sgd": (0, 4.0),
    "adafactor": (0, 4.0),
}


def weight_bytes(shape: ModelShape, precision: Precision, *, double_quant: bool = True) -> float:
    """A loaded base. Embedding, head, norms and biases stay in 16 bits whatever the linears are.

    int8 and fp8 carry one fp32 scale per output row. NF4 carries a scale per 64 weights: 4 bytes, or with double
    quantisation 1 byte plus 4 bytes per 256 of them.
    """
    small = shape.num_embedding_params + shape.num_small_params
    weights = shape.num_linear_params * _LINEAR_BYTES[precision] + small * (4 if precision == "fp32" else 2)
    if precision in ("int8", "fp8"):
        weights += 4 * shape.num_layers * sum(n_out for _, n_out in shape.linears.values())
    if precision == "nf4":
        bytes_per_scale = 1 + 4 / 256 if double_quant else 4
        weights += shape.num_linear_params / _NF4_BLOCK * bytes_per_scale
    return weights


def num_lora_params(shape: ModelShape, r: int, targets: tuple[str, ...] = ()) -> int:
    """r * (in + out) for each adapted linear of each layer; no targets: all seven."""
    names = targets or tuple(shape.linears)
    return shape.num_layers * r * sum(sum(shape.linears[name]) for name in names)


def optimizer_bytes_per_param(name: str) -> float:
    """State of a transformers `optim` name. Unknown names count as fp32 Adam, the largest of the usual ones."""
    kind = name.lower().removeprefix("paged_")
    num_states, width = next(
        (states for prefix, states in _OPTIMIZER_STATES.items() if kind.startswith(prefix)), (2, 4.0)
    )
    return num_states * (_8BIT_STATE if "8bit" in kind else width)


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of every layer, 16 bits."""
    return 2 * 2 * shape.num_layers * shape.kv_dim


def kv_needed_bytes(settings: PlanSettings) -> int:
    """KV of all completions that are generated at once: vLLM keeps a group's shared prompt once."""
    groups, group = settings.num_groups_at_once, settings.num_generations
    num_tokens = groups * settings.max_prompt_len + groups * group * settings.max_completion_len
    if settings.generator == "transformers":
        num_tokens = groups * group * settings.row_len
    return kv_bytes_per_token(settings.teacher) * num_tokens


def kv_minimum_bytes(settings: PlanSettings) -> int:
    """One row of full length; vLLM refuses to start with less."""
    return kv_bytes_per_token(settings.teacher) * settings.row_len


def vllm_work_bytes(shape: ModelShape) -> float:
    """Activations of vLLM's largest batch (hidden, norm, gate and up outputs) and the sampler's fp32 logits, twice."""
    tokens, rows = VLLM_BATCHED_TOKENS.value, VLLM_SEQUENCES.value
    return tokens * (6 * shape.hidden + 4 * shape.intermediate) + 2 * 4 * rows * shape.vocab


def _head_tile_bytes(num_scored: int) -> float:
    return 2 * min(num_scored, HEAD_TILE_TOKENS.value) * HEAD_TILE_VOCAB.value


def mask_bytes(settings: PlanSettings) -> float:
    """sdpa with padding: a boolean mask that lives through the forward, and its 16-bit copy inside the kernel."""
    if not settings.materialised_mask:
        return 0.0
    return 3.0 * settings.micro_batch * settings.row_len**2


def train_activation_bytes(settings: PlanSettings) -> float:
    """Peak of what a training step adds to the states: the larger of one layer's recomputation and the head."""
    shape, tokens = settings.teacher, settings.micro_batch * settings.row_len
    h, i, num_layers = shape.hidden, shape.intermediate, shape.num_layers
    num_scored = settings.micro_batch * settings.max_completion_len
    if settings.checkpointing == "none":
        return (16.8 * h + 8 * i) * num_layers * tokens
    checkpoints = 0.0 if settings.checkpointing == "layers_offloaded" else 2.0 * h * num_layers * tokens
    leak = 0.0
    if settings.precision == "int8" and not settings.int8_inputs_released:
        leak = (6.0 * h + 2 * i) * num_layers * tokens
    mlp = 14.0 if settings.precision == "int8" else 11.2
    layer = (26.0 * h + mlp * i) * tokens + 2 * h * i
    if settings.full_logits:
        head = 14.0 * shape.vocab * num_scored + 6 * h * tokens
    else:
        head = _head_tile_bytes(num_scored) + 8 * h * num_scored + 6 * h * tokens
    return checkpoints + leak + max(layer, head)


def score_activation_bytes(settings: PlanSettings, shape: ModelShape) -> float:
    """Peak of a forward without gradients over one micro-batch: one layer at a time, or the head's tile."""
    tokens = settings.micro_batch * settings.row_len
    layer = (9.0 * shape.hidden + 10 * shape.intermediate) * tokens
    return max(layer, _head_tile_bytes(tokens) + 6 * shape.hidden * tokens)
