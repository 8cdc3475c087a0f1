"""Work of a teacher's optimizer step, phase by phase: what planner/teacher.py's run computes, for the plan of time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from core.types import Phase
from planner.components import kv_bytes_per_token, num_lora_params
from planner.constants import CANARY_TOKENS
from planner.rates import Rates
from planner.time import Lengths
from planner.work import Decoding, Rows, Work, decode_work, forward_work, prefill_work, training_work

if TYPE_CHECKING:
    from planner.teacher import TeacherSettings

# Work of Python that does not belong to a forward, in operations; measured on a CPU (docs/measurements.md).
OPS_PER_DECODING_STEP, OPS_PER_DECODING_LAYER, OPS_PER_DECODED_TOKEN, OPS_PER_REQUEST = 400.0, 60.0, 2.0, 75.0
"""vLLM: scheduling and the rest of a step; a block of it (no CUDA graphs); bookkeeping of a row, and of its request."""
CPU_ADAPTER_BYTES, CPU_KV_BLOCK = 22.0, 128
"""vLLM's CPU build copies the adapter for every token that it reads or writes: bytes a parameter. It finds a prompt in
its cache by blocks of so many tokens."""
OPS_PER_SYNC, OPS_PER_SYNCED_MATRIX = 600.0, 12.0
OPS_PER_SCORED_ROW, OPS_PER_TRAINED_ROW, OPS_PER_TRAINED_STEP = 25.0, 15.0, 500.0
"""Texts, spans and tables of a row; loss, log, optimizer and callbacks of a step."""
OPTIMIZER_OPS_PER_MATRIX = 8.0


def teacher_work(settings: "TeacherSettings", lengths: Lengths, rates: Rates) -> Mapping[Phase, Sequence[Work]]:
    """What every phase of a step computes; a rollout's share where it serves several steps."""
    share = 1 / settings.steps_per_rollout
    rollout = {
        Phase.SYNC: [part.times(share) for part in _sync(settings)],
        Phase.GENERATE: [part.times(share) for part in _generate(settings, lengths, rates)],
        Phase.SCORE: [part.times(share) for part in _score(settings, lengths)],
    }
    return rollout | ({Phase.TRAIN: _train(settings, lengths)} if settings.trains else {})


def _teacher_rows(settings: "TeacherSettings", lengths: Lengths) -> Rows:
    return Rows(
        num_rows=settings.train_batch,
        group=settings.num_generations,
        prefix_len=lengths.prompt,
        own_len=lengths.completion,
        scored_len=lengths.completion,
        shares_prefix=settings.sequence_layout == "shared_prefix",
        pads=settings.sequence_layout == "padded",
    )


def _student_rows(settings: "TeacherSettings", lengths: Lengths) -> Rows:
    """Question as prefix; the explanation and then the solution as the answer."""
    return Rows(
        num_rows=settings.train_batch,
        group=settings.num_generations,
        prefix_len=max(lengths.prompt - lengths.solution, 0.0),
        own_len=lengths.completion + lengths.solution,
        scored_len=lengths.completion + lengths.solution,
        shares_prefix=settings.sequence_layout == "shared_prefix",
        pads=settings.sequence_layout == "padded",
    )


def _num_matrices(settings: "TeacherSettings") -> int:
    return 2 * settings.teacher.num_layers * (len(settings.lora_targets) or 7)


def _sync(settings: "TeacherSettings") -> list[Work]:
    """Adapter out and in again, 16-bit and through memory, and the canary's two forwards."""
    shape, num_params = settings.teacher, num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)
    canary = Rows(
        num_rows=4, group=1, prefix_len=0, own_len=CANARY_TOKENS.value / 4, scored_len=CANARY_TOKENS.value / 4
    )
    moved = Work(
        traffic_bytes=4.0 * settings.adapter_bytes_per_param * num_params,
        num_ops=OPS_PER_SYNC + OPS_PER_SYNCED_MATRIX * _num_matrices(settings),
    )
    asked = forward_work(shape, settings.precision, canary, batch_tokens=CANARY_TOKENS.value)
    return [moved, asked, asked]


def _generate(settings: "TeacherSettings", lengths: Lengths, rates: Rates) -> list[Work]:
    shape, rows = settings.teacher, _teacher_rows(settings, lengths)
    # vLLM's CPU build multiplies in 16 bits alone.
    precision = settings.generator_precision if rates.launches_overlap else "bf16"
    num_calls = -(-settings.train_batch // (settings.num_generations * settings.num_groups_at_once))
    launches_layers = settings.enforce_eager or not rates.launches_overlap or settings.generator == "transformers"
    per_layer = OPS_PER_DECODING_LAYER * shape.num_layers if launches_layers else 0.0
    decoded = decode_work(
        shape,
        precision,
        rows,
        num_steps=num_calls * lengths.longest_completion,
        kv_bytes_per_token=kv_bytes_per_token(shape, settings.kv_bytes_per_value),
        decoding=Decoding(ops_per_step=OPS_PER_DECODING_STEP + per_layer, ops_per_row=OPS_PER_DECODED_TOKEN),
        rates=rates,
    )
    requests = Work(num_ops=OPS_PER_REQUEST * rows.num_rows)
    if rates.launches_overlap or settings.generator != "vllm":
        return [prefill_work(shape, precision, rows), decoded, requests]
    again = lengths.prompt % CPU_KV_BLOCK  # of a prompt that others of the group have had: what fills no block
    read = rows.num_prefixes * lengths.prompt + (rows.num_rows - rows.num_prefixes) * again
    num_params = num_lora_params(shape, settings.lora_r, settings.lora_targets)
    adapters = (read + rows.num_rows * lengths.completion) * CPU_ADAPTER_BYTES * num_params
    filled = replace(rows, num_rows=round(read / lengths.prompt), group=1)
    return [prefill_work(shape, precision, filled), decoded, requests, Work(traffic_bytes=adapters)]


def _score(settings: "TeacherSettings", lengths: Lengths) -> list[Work]:
    """The student's forward, those of reference and old policy where the loss uses them, and the rows' texts."""
    batch_tokens = settings.score_batch_tokens
    student = settings.student or settings.teacher
    precision = settings.scored_in if settings.student else settings.precision
    work = [
        Work(num_ops=OPS_PER_SCORED_ROW * settings.train_batch),
        forward_work(student, precision, _student_rows(settings, lengths), batch_tokens=batch_tokens),
    ]
    num_more = int(settings.reference != "none") + int(settings.scores_policy)
    rows = _teacher_rows(settings, lengths)
    return work + num_more * [forward_work(settings.teacher, settings.precision, rows, batch_tokens=batch_tokens)]


def _train(settings: "TeacherSettings", lengths: Lengths) -> list[Work]:
    num_params = num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)
    stepped = Work(
        traffic_bytes=10.0 * settings.adapter_bytes_per_param * num_params,
        num_ops=OPS_PER_TRAINED_STEP
        + OPS_PER_TRAINED_ROW * settings.train_batch
        + OPTIMIZER_OPS_PER_MATRIX * _num_matrices(settings),
    )
    learned = training_work(
        settings.teacher,
        settings.precision,
        _teacher_rows(settings, lengths),
        batch_tokens=settings.micro_batch_tokens,
        recomputes=settings.checkpointing != "none",
        lora_r=settings.lora_r,
    )
    return [learned, stepped]
