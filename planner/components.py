"""Static memory: bytes that stay on the GPU through a phase: weights, optimizer states, vLLM (docs/memory.md)."""

from typing import TYPE_CHECKING

from planner.constants import HEAD_TILE_COLUMNS, HEAD_TILE_TOKENS, INT8_CHUNK_BYTES, VLLM_BATCHED_TOKENS
from planner.settings import PlanSettings, Precision
from planner.shapes import ModelShape

if TYPE_CHECKING:
    from planner.teacher import TeacherSettings

LINEAR_BYTES: dict[Precision, float] = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "int8_groups": 1, "nf4": 0.5}
NF4_BLOCK = 64

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

    int8 and fp8 carry one fp32 scale per output row; int8 in groups (the export of an NF4 base) a 16-bit one per 64
    weights. NF4 carries one per 64 weights: 4 bytes, or with double quantisation 1 byte plus 4 bytes per 256 of them.
    """
    small = shape.num_embedding_params + shape.num_small_params
    weights = shape.num_linear_params * LINEAR_BYTES[precision] + small * (4 if precision == "fp32" else 2)
    if precision in ("int8", "fp8"):
        weights += 4 * shape.num_layers * sum(n_out for _, n_out in shape.linears.values())
    if precision == "int8_groups":
        weights += 2 * shape.num_linear_params / NF4_BLOCK
    if precision == "nf4":
        bytes_per_scale = 1 + 4 / 256 if double_quant else 4
        weights += shape.num_linear_params / NF4_BLOCK * bytes_per_scale
    return weights


def head_tile_bytes(shape: ModelShape, num_tokens: float, width: int) -> float:
    """The tile of logits that TRL's head works on."""
    return float(width * min(num_tokens, HEAD_TILE_TOKENS.value) * min(shape.vocab, HEAD_TILE_COLUMNS.value))


def layer_bytes(shape: ModelShape, precision: Precision, *, double_quant: bool = True) -> float:
    """One block of a loaded base; the rest of it are embedding, head and the last norm."""
    rest = (shape.num_embedding_params + shape.hidden) * (4 if precision == "fp32" else 2)
    return (weight_bytes(shape, precision, double_quant=double_quant) - rest) / shape.num_layers


def num_lora_params(shape: ModelShape, r: int, targets: tuple[str, ...] = ()) -> int:
    """Parameters of a LoRA adapter: r * (in + out) for each adapted linear; no targets: all seven of each layer."""
    names = targets or tuple(shape.linears)
    return shape.num_layers * r * sum(sum(shape.linears[name]) for name in names)


def optimizer_bytes_per_param(name: str) -> float:
    """Bytes of state by transformers' `optim` name. Unknown names count as fp32 Adam, the largest of the usual ones."""
    kind = name.lower().removeprefix("paged_")
    num_states, width = next(
        (states for prefix, states in _OPTIMIZER_STATES.items() if kind.startswith(prefix)), (2, 4.0)
    )
    return num_states * (_8BIT_STATE if "8bit" in kind else width)


def adapter_checkpoint_bytes(settings: PlanSettings, num_adapters: int = 1) -> float:
    """Adapters and the optimizer's states of one of them."""
    num_params = num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)
    states = optimizer_bytes_per_param(settings.optimizer)
    return num_params * (num_adapters * settings.adapter_bytes_per_param + states)


def muon_state_bytes(shape: ModelShape) -> float:
    """A momentum for the matrices of the blocks; AdamW's two moments for the rest."""
    return 4.0 * shape.num_linear_params + 8.0 * (shape.num_params - shape.num_linear_params)


VLLM_KV_BLOCK_TOKENS = 128
"""vLLM hands out its KV cache in blocks of 16 tokens on a GPU and 128 on a CPU, and keeps one to itself."""


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: int = 2) -> int:
    """Keys and values of every layer, 16 bits unless the cache is narrower."""
    return 2 * bytes_per_value * shape.num_layers * shape.kv_dim


def kv_needed_bytes(settings: "TeacherSettings") -> int:
    """KV of all completions that are generated at once: vLLM keeps a group's shared prompt once."""
    groups, group = settings.num_groups_at_once, settings.num_generations
    prompt_len, completion_len = _whole_blocks(settings.max_prompt_len), _whole_blocks(settings.max_completion_len)
    num_tokens = groups * prompt_len + groups * group * completion_len + VLLM_KV_BLOCK_TOKENS
    if settings.generator == "transformers":
        num_tokens = groups * group * settings.row_len
    return kv_bytes_per_token(settings.teacher, settings.kv_bytes_per_value) * num_tokens


def kv_minimum_bytes(settings: "TeacherSettings") -> int:
    """KV of one row of full length; vLLM refuses to start with less."""
    num_tokens = _whole_blocks(settings.row_len) + VLLM_KV_BLOCK_TOKENS
    return kv_bytes_per_token(settings.teacher, settings.kv_bytes_per_value) * num_tokens


def _whole_blocks(num_tokens: int) -> int:
    return -(-num_tokens // VLLM_KV_BLOCK_TOKENS) * VLLM_KV_BLOCK_TOKENS


def vllm_own_bytes(settings: "TeacherSettings") -> float:
    """Weights of vLLM that the trainer does not hold: a base, or beside a shared one its norms, biases, and rope."""
    shape = settings.teacher
    if not settings.shares_base:
        return weight_bytes(shape, settings.generator_precision, double_quant=settings.double_quant)
    return 2.0 * (shape.num_small_params + rope_values(shape))


def rope_values(shape: ModelShape) -> int:
    """Sines and cosines of every position, one table for all layers."""
    return shape.max_positions * shape.head_dim


def vllm_work_bytes(settings: "TeacherSettings") -> float:
    """Activations of vLLM's largest batch (hidden, norm, gate and up outputs) and the sampler's fp32 logits, twice.

    On a shared base also the 16-bit copy of a piece of a matrix, while many rows are multiplied.
    """
    shape, num_rows = settings.teacher, settings.aggregation_steps * settings.num_generations
    widened = 0.0
    if settings.shares_base:  # of NF4 one whole matrix (bitsandbytes' own op), of int8 a chunk of rows
        largest = 2.0 * shape.hidden * shape.intermediate
        widened = largest if settings.precision == "nf4" else min(largest, INT8_CHUNK_BYTES.value)
    return (
        widened
        + VLLM_BATCHED_TOKENS.value * (6 * shape.hidden + 4 * shape.intermediate)
        + 2 * 4 * num_rows * shape.vocab
    )
