"""Lower bounds (floors) on the time of a training step, from a GPU's measured rates. Arithmetic; no torch.

Linear layers take 2 operations a weight and token, attention 4 a pair of query and key and channel. Training an
adapter with recomputed blocks runs each linear three times (forward, forward again, gradient of the inputs; none of the
frozen weights), and attention 4.5 times. A decoding step reads every weight once and every cached key and value of its
rows. Prompts are read once for each group in prefill (prefix cache), and with each row everywhere else.
"""

from dataclasses import dataclass

from planner.components import kv_bytes_per_token, weight_bytes
from planner.rates import Rates
from planner.settings import Precision
from planner.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Size of one optimizer step; lengths in tokens."""

    shape: ModelShape
    generator_precision: Precision
    rows: int
    group: int
    prompt_len: float
    completion_len: float


def floor_seconds(work: StepWork, rates: Rates) -> dict[str, float]:
    """Lower bound in seconds of each phase: `generate`, `score` (student and reference), `train`."""
    shape, row_len = work.shape, work.prompt_len + work.completion_len
    head_flop = 2.0 * shape.vocab * shape.hidden
    linear_flop = 2.0 * shape.num_linear_params * row_len + head_flop * work.completion_len
    forward = work.rows * (linear_flop + _attention_flop(shape, row_len))
    train = work.rows * (3 * linear_flop + 4.5 * _attention_flop(shape, row_len))
    return {
        "generate": _prefill_s(work, rates) + _decode_s(work, rates),
        "score": 2 * forward / rates.matmul_flop_per_s,
        "train": train / rates.matmul_flop_per_s,
    }


def _attention_flop(shape: ModelShape, length: float) -> float:
    """Causal: half of all pairs."""
    return 4.0 * shape.q_dim * shape.num_layers * length**2 / 2


def _prefill_s(work: StepWork, rates: Rates) -> float:
    flop = 2.0 * work.shape.num_linear_params * work.prompt_len + _attention_flop(work.shape, work.prompt_len)
    return work.rows / work.group * flop / rates.matmul_flop_per_s


def _decode_s(work: StepWork, rates: Rates) -> float:
    """All rows decode at once: weights are read once per position. The larger of traffic and arithmetic."""
    shape, steps = work.shape, work.completion_len
    read_once = weight_bytes(shape, work.generator_precision)
    if not shape.tied_embeddings:
        read_once -= 2.0 * shape.vocab * shape.hidden  # a look-up of the input embedding reads one row
    cached_tokens = steps * work.prompt_len + steps**2 / 2
    traffic = steps * read_once + work.rows * cached_tokens * kv_bytes_per_token(shape)
    flop = work.rows * (
        steps * 2.0 * (shape.num_linear_params + shape.vocab * shape.hidden)
        + 4.0 * shape.q_dim * shape.num_layers * cached_tokens
    )
    return max(traffic / rates.copy_bytes_per_s, flop / rates.matmul_flop_per_s)
