"""Work of a pass of a model, in operations, bytes and launches, and its seconds at a device's rates.

Linear layers take 2 operations a weight and token, attention 4 a pair of query and key and channel. Training an adapter
runs each linear twice (forward, gradient of its inputs; none of the frozen weights), once more where blocks are
recomputed, and attention 3.5 times, or 4.5. The head runs where something is scored; its backward computes it again.

How many operations a pass asks torch for was counted (tests/test_time_plan.py); on small models issuing them is most of
the time, on large ones next to none of it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from planner.components import LINEAR_BYTES, num_lora_params, weight_bytes
from planner.rates import Rates
from planner.settings import Precision
from planner.shapes import ModelShape

OPS_PER_FORWARD = 40
OPS_PER_LAYER: dict[Literal["forward", "training"], int] = {"forward": 110, "training": 470}
"""Of one block: without gradient; forward and backward with an adapter."""
OPS_PER_SEGMENT: dict[Literal["forward", "training"], float] = {"forward": 5.8, "training": 15.3}
"""Attention of one segment of a packed batch in one block."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass takes. `width` and `kind` say at what rate a CPU does its products."""

    flop: float = 0.0
    traffic_bytes: float = 0.0
    num_ops: float = 0.0
    width: int = 1
    kind: str = "bf16 forward"

    def seconds(self, rates: Rates) -> float:
        computing = self.flop / rates.flop_per_s(self.width, self.kind) + self.traffic_bytes / rates.copy_bytes_per_s
        issuing = self.num_ops * rates.op_s
        return max(computing, issuing) if rates.launches_overlap else computing + issuing

    def times(self, factor: float) -> "Work":
        return replace(
            self,
            flop=factor * self.flop,
            traffic_bytes=factor * self.traffic_bytes,
            num_ops=factor * self.num_ops,
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a pass: groups of `group` rows that have a prefix in common, and what each has after it."""

    num_rows: int
    group: int
    prefix_len: float
    own_len: float
    scored_len: float
    """Tokens of a row that are scored."""
    shares_prefix: bool = True
    pads: bool = False
    """Rows are padded to the longest of their batch, and attention is one launch."""

    @property
    def num_prefixes(self) -> float:
        return self.num_rows / self.group

    @property
    def num_tokens(self) -> float:
        """Tokens that are computed."""
        return (self.num_prefixes if self.shares_prefix else self.num_rows) * self.prefix_len + (
            self.num_rows * self.own_len
        )

    @property
    def num_pairs(self) -> float:
        """Pairs of a query and a key that it sees."""
        own = self.num_rows * (self.own_len**2 / 2 + self.own_len * self.prefix_len)
        return own + (self.num_prefixes if self.shares_prefix else self.num_rows) * self.prefix_len**2 / 2

    @property
    def num_segments(self) -> float:
        """Pieces of a packed batch, each with an attention of its own."""
        if self.pads:
            return 0.0
        return self.num_rows + (self.num_prefixes if self.shares_prefix and self.group > 1 else 0)


def compute_dtype(precision: Precision) -> Literal["bf16", "fp32"]:
    return "fp32" if precision == "fp32" else "bf16"


def forward_work(shape: ModelShape, precision: Precision, rows: Rows, *, batch_tokens: float) -> Work:
    """A model scores rows in batches of at most so many tokens, without gradient."""
    return _pass_work(shape, precision, rows, batch_tokens, kind="forward", linear=1, attention=1, head=1)


def training_work(
    shape: ModelShape, precision: Precision, rows: Rows, *, batch_tokens: float, recomputes: bool, lora_r: int
) -> Work:
    """Forward and backward of rows, an adapter of rank r on every linear."""
    again = int(recomputes)
    work = _pass_work(
        shape, precision, rows, batch_tokens, kind="training", linear=2 + again, attention=3.5 + again, head=3
    )
    adapter = 2.0 * (3 + again) * num_lora_params(shape, lora_r) * rows.num_tokens
    recomputed_ops = again * _num_ops(shape, rows, batch_tokens, "forward")
    return replace(work, flop=work.flop + adapter, num_ops=work.num_ops + recomputed_ops)


def _pass_work(
    shape: ModelShape,
    precision: Precision,
    rows: Rows,
    batch_tokens: float,
    *,
    kind: Literal["forward", "training"],
    linear: float,
    attention: float,
    head: float,
) -> Work:
    flop = linear * 2.0 * shape.num_linear_params * rows.num_tokens
    flop += attention * 4.0 * shape.q_dim * shape.num_layers * rows.num_pairs
    flop += head * 2.0 * shape.vocab * shape.hidden * rows.num_rows * rows.scored_len
    widened = 4.0 if LINEAR_BYTES[precision] < 2 else 0.0  # written in 16 bits and read again
    read = shape.num_linear_params * (LINEAR_BYTES[precision] + widened)
    return Work(
        flop=flop,
        traffic_bytes=linear * _num_batches(rows, batch_tokens) * read,
        num_ops=_num_ops(shape, rows, batch_tokens, kind),
        width=shape.hidden,
        kind=f"{compute_dtype(precision)} {kind}",
    )


def _num_batches(rows: Rows, batch_tokens: float) -> float:
    return max(1.0, rows.num_tokens / batch_tokens)


def _num_ops(shape: ModelShape, rows: Rows, batch_tokens: float, kind: Literal["forward", "training"]) -> float:
    per_layer = OPS_PER_LAYER[kind] * _num_batches(rows, batch_tokens) + OPS_PER_SEGMENT[kind] * rows.num_segments
    return OPS_PER_FORWARD * _num_batches(rows, batch_tokens) + shape.num_layers * per_layer


def prefill_work(shape: ModelShape, precision: Precision, rows: Rows) -> Work:
    """A generator reads each prompt once."""
    flop = 2.0 * shape.num_linear_params * rows.num_prefixes * rows.prefix_len
    flop += 4.0 * shape.q_dim * shape.num_layers * rows.num_prefixes * rows.prefix_len**2 / 2
    return Work(flop=flop, width=shape.hidden, kind=f"{compute_dtype(precision)} forward")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a generator decodes: launches of a step, and of a row in a step."""

    ops_per_step: float
    ops_per_row: float


def decode_work(
    shape: ModelShape,
    precision: Precision,
    rows: Rows,
    *,
    num_steps: float,
    kv_bytes_per_token: float,
    decoding: Decoding,
    rates: Rates,
) -> Work:
    """Tokens one after another: a step reads every weight once and every cached key and value of its rows.

    On a GPU weights and caches are read while products run, so the larger of the two counts; on a CPU both.
    """
    read_once = weight_bytes(shape, precision)
    if not shape.tied_embeddings:
        read_once -= 2.0 * shape.vocab * shape.hidden  # a look-up of the input embedding reads one row
    cached_tokens = rows.own_len * rows.prefix_len + rows.own_len**2 / 2
    traffic = num_steps * read_once + rows.num_rows * cached_tokens * kv_bytes_per_token
    flop = rows.num_rows * (
        rows.own_len * 2.0 * (shape.num_linear_params + shape.vocab * shape.hidden)
        + 4.0 * shape.q_dim * shape.num_layers * cached_tokens
    )
    kind = f"{compute_dtype(precision)} forward"
    hides = rates.launches_overlap
    binds = flop / rates.flop_per_s(shape.hidden, kind) > traffic / rates.copy_bytes_per_s
    return Work(
        flop=flop if binds or not hides else 0.0,
        traffic_bytes=traffic if not binds or not hides else 0.0,
        num_ops=num_steps * decoding.ops_per_step + rows.num_rows * rows.own_len * decoding.ops_per_row,
        width=shape.hidden,
        kind=kind,
    )
