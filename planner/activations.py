"""Activation memory: peak bytes that a forward (and backward) adds to the weights.

Each moment is a sum of the tensors that are alive then, read off the live storages of the simulator (tests/helpers/
memory_simulator.py) at its peak; `tests/test_planner_formula.py` holds the two within 2 %.

Letters: h hidden, i intermediate, L layers, V vocabulary, q and kv the widths of queries and of keys, S row length,
T = rows * S tokens of a forward.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from planner.components import head_tile_bytes, num_lora_params
from planner.constants import EXPANDABLE_FRAGMENTATION_FRAC, FRAGMENTATION_FRAC, HEAD_CHUNK_TOKENS
from planner.settings import PlanSettings
from planner.shapes import ModelShape

if TYPE_CHECKING:
    from planner.teacher import TeacherSettings


def train_activation_bytes(settings: PlanSettings) -> float:
    """Peak of one micro-batch's forward and backward over the states (weights, adapter, gradients, optimizer)."""
    shape = settings.teacher
    num_tokens = settings.micro_batch_tokens
    if settings.checkpointing == "none":
        kept = shape.num_layers * _layer_kept(settings) * num_tokens + _layer_masks(settings) * shape.num_layers
        if settings.mlp_tile_tokens is not None:  # each tile is checkpointed: none of its activations outlives it
            kept -= (shape.num_layers - 1) * 8 * _mlp_width(settings, shape, num_tokens) * num_tokens
        if settings.adapter_bytes_per_param == 4:
            kept += _adapter_casts(settings)
        moment = max(_last_layer_forward(settings) * num_tokens, _head_moment(settings))
    else:
        # Offloaded: the block's own input is back on the GPU, and the next one's on its way.
        num_on_card = 2 if settings.checkpointing == "layers_offloaded" else shape.num_layers
        kept = 2.0 * shape.hidden * num_tokens * num_on_card
        if settings.quantises_activations and not settings.int8_inputs_released:
            inputs = 4 * shape.hidden + 2 * shape.q_dim + 2 * shape.intermediate
            kept += shape.num_layers * inputs * num_tokens
        if (
            not settings.full_logits and not settings.tiled_head
        ):  # the scored hidden states outlive the head's backward (simulated)
            kept += 2.0 * shape.hidden * num_tokens * settings.max_completion_len / settings.row_len
        moment = max(_layer_moment(settings), _head_moment(settings) + _adapter_casts(settings))
    return kept + moment + _mask_bytes(settings, num_tokens)


def _adapter_casts(settings: PlanSettings) -> float:
    """Autocast's 16-bit copies of a float32 adapter, kept until the forward ends."""
    return 2.0 * _num_adapter_params(settings) if settings.adapter_bytes_per_param == 4 else 0.0


def _num_adapter_params(settings: PlanSettings) -> int:
    return num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)


def _is_recast(settings: PlanSettings) -> bool:
    """peft's plain linears cast their input to a float32 adapter's dtype, and autocast back: one more copy each.

    Its bitsandbytes linears leave the cast to autocast, which finds a 16-bit input.
    """
    return settings.precision in ("bf16", "fp8", "fp32") and settings.adapter_bytes_per_param == 4


def _mlp_width(settings: PlanSettings, shape: ModelShape, num_tokens: float) -> float:
    """MLP columns that are alive per token of the forward: all, or those of one tile spread over all tokens."""
    tile_tokens = settings.mlp_tile_tokens or num_tokens
    return shape.intermediate * min(1.0, tile_tokens / num_tokens)


def _layer_kept(settings: PlanSettings) -> float:
    """Bytes per token that autograd keeps of one block.

    Two norms: float32 input and 16-bit output (6h each). Attention: q, output, k, v. MLP: gate, silu, up, product.
    The low-rank activations of the seven adapters.
    """
    shape = settings.teacher
    h, q, kv = shape.hidden, shape.q_dim, shape.kv_dim
    i = _mlp_width(settings, shape, settings.micro_batch_tokens)
    kept = 12.0 * h + 4 * q + 4 * kv + 8 * i + 2 * settings.lora_r * (len(settings.lora_targets) or 7)
    if shape.qk_norm:
        kept += 4 * q + 4 * kv
    if settings.attention == "masked_sdpa" and shape.num_heads > shape.num_kv_heads:
        kept += 4 * q - 4 * kv  # keys and values are repeated for each query head
    if _is_recast(settings):
        kept += 6 * h + 2 * q
    return kept


def _layer_moment(settings: PlanSettings) -> float:
    """Checkpointing: the peak while one block is recomputed and differentiated; its incoming gradient is 2h."""
    shape = settings.teacher
    num_tokens = settings.micro_batch_tokens
    h, i = shape.hidden, _mlp_width(settings, shape, num_tokens)
    kept = 2 * h + _layer_kept(settings)
    if settings.quantises_activations:
        threshold_is_on = settings.int8_threshold > 0
        # down_proj quantises its input (fp16, absolute values, int8, outlier mask), or up_proj's int32 output is cast.
        per_token = kept + (4 * h + 6 * i if threshold_is_on else 5 * h + 4 * i)
    elif _is_recast(settings):
        per_token = kept + 8 * h + 6 * i  # down_proj's input as float32 and again as 16 bits
    else:
        per_token = kept + 4 * i  # gradients of up and of silu(gate)
    # Backward of the norm before the MLP, in float32: more than the MLP's own where that is tiled.
    moments = [per_token * num_tokens, (kept - 8 * i + 19 * h) * num_tokens]
    if settings.precision in ("int8", "nf4"):
        # Backward of down_proj: its whole weight in 16 bits beside the gradient of the product.
        moments.append((kept + 2 * i) * num_tokens + 2 * h * shape.intermediate)
    if settings.attention == "eager":
        scores = shape.num_heads * num_tokens * settings.row_len
        moments[0] += 6 * scores
        moments.append((8 * h + 6 * shape.q_dim) * num_tokens + 12 * scores)
    return max(moments) + _adapter_casts(settings) / shape.num_layers + _layer_masks(settings)


def _last_layer_forward(settings: PlanSettings) -> float:
    """No checkpointing: bytes per token that the last block's MLP needs for a moment beside what it keeps."""
    h = settings.teacher.hidden
    i = _mlp_width(settings, settings.teacher, settings.micro_batch_tokens)
    if settings.quantises_activations:
        return 2 * h + (6 * i if settings.int8_threshold > 0 else 4 * i)
    return 10 * h + 6 * i if _is_recast(settings) else 2 * h + 4 * i


def _head_moment(settings: PlanSettings) -> float:
    """The final norm's backward in float32 (20h), or the head over the scored tokens."""
    shape = settings.teacher
    num_tokens = settings.micro_batch_tokens
    if settings.tiled_head:  # hidden states of the learned tokens, and their gradient in float32
        head = head_tile_bytes(shape, num_tokens, 2) + 4.0 * shape.hidden * num_tokens
    elif settings.full_logits:
        # 16-bit and float32 logits, log-softmax, its gradient
        head = (12.0 * shape.vocab + 4 * shape.hidden) * settings.micro_batch * settings.max_completion_len
    else:
        head = _head_chunk_bytes(shape, num_tokens)
    return max(20.0 * shape.hidden * num_tokens, head + 6 * shape.hidden * num_tokens)


def _head_chunk_bytes(shape: ModelShape, num_scored: float) -> float:
    """The head on one chunk of tokens: float32 logits, and one tensor of their size beside them."""
    return 2.0 * 4 * min(num_scored, HEAD_CHUNK_TOKENS.value) * shape.vocab


def _mask_bytes(settings: PlanSettings, num_tokens: float) -> float:
    """The mask that every block shares: boolean for sdpa, 16-bit for eager attention."""
    width = {"flash": 0, "masked_sdpa": 1, "eager": 2}[settings.attention]
    return float(width * num_tokens * settings.row_len)


def _layer_masks(settings: PlanSettings) -> float:
    """sdpa's kernel takes the mask as a 16-bit bias, which it keeps for its backward."""
    return 2.0 * settings.micro_batch_tokens * settings.row_len if settings.attention == "masked_sdpa" else 0.0


def score_activation_bytes(settings: "TeacherSettings") -> float:
    """Peak of the scorer's forwards without gradients: student, teacher, reference, in batches of the same tokens."""
    num_tokens = min(settings.score_batch_tokens, settings.train_batch * settings.row_len)
    student = settings.student or settings.teacher
    frozen = replace(settings, precision=settings.scored_in)
    heads = [
        _head_chunk_bytes(shape, num_tokens) + 4.0 * shape.hidden * num_tokens for shape in (student, settings.teacher)
    ]
    return max(
        *heads,
        forward_bytes(frozen if settings.student else settings, student, num_tokens, adapter=False),
        forward_bytes(settings, settings.teacher, num_tokens, adapter=True),
    )


def forward_bytes(settings: PlanSettings, shape: ModelShape, num_tokens: float, *, adapter: bool) -> float:
    """Peak of the blocks' forward without gradients over full rows; nothing is kept from block to block."""
    h, q, kv = shape.hidden, shape.q_dim, shape.kv_dim
    i = _mlp_width(settings, shape, num_tokens)
    mask = _mask_bytes(settings, num_tokens)
    if settings.quantises_activations:
        mlp = (9.0 * h + 10 * i) * num_tokens
    elif settings.precision == "fp8":  # down_proj's input in 16 bits, scaled in float32, and rounded
        mlp = (8.0 * h + 7 * i) * num_tokens
    else:
        recast = 4 * h if adapter and _is_recast(settings) else 0
        mlp = (8.0 * h + recast + (8 if adapter else 6) * i) * num_tokens
        if settings.precision in ("int8", "nf4"):
            mlp = max(mlp, (8.0 * h + (6 if adapter else 4) * i) * num_tokens + 2 * h * shape.intermediate)
    attention = 0.0
    if settings.attention == "masked_sdpa":
        attention = (6.0 * h + 8 * q + 4 * kv) * num_tokens + 3 * mask
    if settings.attention == "eager":
        attention = (6.0 * h + 6 * q + 4 * kv) * num_tokens + 10.0 * shape.num_heads * num_tokens * settings.row_len
    return mask + max(mlp, attention)


def dynamic_components(settings: PlanSettings, activations: float) -> dict[str, float]:
    """Activations, and what the allocator reserves beyond them because their sizes vary."""
    overhead = EXPANDABLE_FRAGMENTATION_FRAC if settings.expandable_segments else FRAGMENTATION_FRAC
    return {"activations": activations, "allocator": activations * overhead.value}
