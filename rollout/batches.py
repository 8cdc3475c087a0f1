"""Batches of rows for one forward: padded to the longest row, or packed one after another without padding.

    layout          a forward computes                                         attention
    shared_prefix   every token once, a group's common prefix once for all     rollout/packed_attention.py
    packed          every token of every row once                              rollout/packed_attention.py
    padded          every row as long as the longest of its batch              any

All three give the same hidden states (to rounding), so they differ in speed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollout.packed_attention import Layout, Segments
from rollout.types import ScoringRow

BATCH_OVERHEAD_TOKENS = 256
"""What one more forward costs, as tokens: its launches and reading the weights (assumed, not measured on a GPU)."""


def input_len(row: ScoringRow) -> int:
    """Tokens that must be read to predict the row's last scored one; 0 where nothing is scored."""
    for start, end in row.spans:
        if not 1 <= start <= end <= len(row.token_ids):
            raise ValueError(f"span {(start, end)} does not fit a row of {len(row.token_ids)} tokens (start >= 1)")
    return max((end - 1 for start, end in row.spans if end > start), default=0)


def row_batches(rows: Sequence[ScoringRow], max_tokens: int, layout: Layout) -> list[list[int]]:
    """Indices of the rows of each batch, of at most `max_tokens` tokens as the layout computes them.

    A row above the limit goes alone; rows in which nothing is scored are left out. Largest batches come first, so that
    they meet the memory limit first.
    """
    lengths = [input_len(row) for row in rows]
    if layout == "padded":
        return token_batches(lengths, max_tokens)
    pieces: list[tuple[int, list[int]]] = []
    for prefix_len, members in _groups(rows, lengths, layout):
        num_tokens, piece = prefix_len, list[int]()
        for i in sorted(members, key=lambda i: -lengths[i]):
            if piece and num_tokens + lengths[i] - prefix_len > max_tokens:
                pieces.append((num_tokens, piece))
                num_tokens, piece = prefix_len, []
            num_tokens += lengths[i] - prefix_len
            piece.append(i)
        pieces.append((num_tokens, piece))
    return _first_fit(pieces, max_tokens)


def largest_batch_tokens(rows: Sequence[ScoringRow], max_tokens: int, layout: Layout) -> int:
    """Tokens that the forward of the largest of `row_batches` computes."""
    batches = row_batches(rows, max_tokens, layout)
    return max((make_batch([rows[i] for i in batch], layout).num_tokens for batch in batches), default=0)


def largest_group_tokens(rows: Sequence[ScoringRow], layout: Layout) -> int:
    """Tokens of the largest group of rows that have a prefix in common, it counted once; else of the longest row."""
    lengths = [input_len(row) for row in rows]
    if layout == "padded":
        return max(lengths, default=0)
    return max(
        (
            prefix_len + sum(lengths[i] - prefix_len for i in members)
            for prefix_len, members in _groups(rows, lengths, layout)
        ),
        default=0,
    )


def _groups(rows: Sequence[ScoringRow], lengths: Sequence[int], layout: Layout) -> list[tuple[int, list[int]]]:
    """(prefix length, indices of the rows that have this prefix in common), without rows of no length."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if lengths[i]:
            prefix = row.token_ids[: min(row.prefix_len, lengths[i])] if layout == "shared_prefix" else []
            groups.setdefault((*prefix, *([] if prefix else [-1 - i])), []).append(i)
    return [(0 if len(members) == 1 else len(prefix), members) for prefix, members in groups.items()]


def _first_fit(pieces: list[tuple[int, list[int]]], max_tokens: int) -> list[list[int]]:
    """Pieces, largest first, each into the first batch that has room for it."""
    batches: list[tuple[int, list[int]]] = []
    for num_tokens, members in sorted(pieces, key=lambda piece: -piece[0]):
        for b, (filled, batch) in enumerate(batches):
            if filled + num_tokens <= max_tokens:
                batches[b] = (filled + num_tokens, batch + members)
                break
        else:
            batches.append((num_tokens, members))
    return [batch for _, batch in sorted(batches, key=lambda batch: -batch[0])]


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each padded batch: rows of like length together, at most `max_tokens` padded tokens.

    Of all ways to cut the rows, sorted by length, into batches, the one with the fewest padded tokens, where a batch
    costs as much as `BATCH_OVERHEAD_TOKENS` beside them. Longest first, so that the largest batch meets the memory
    limit first. A row above the limit goes alone; rows of no length are left out.
    """
    order = sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: -lengths[i])
    cost, cut = [0], [0]  # of the best batches for the first n rows: their cost, and where the last of them begins
    for end in range(1, len(order) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            num_tokens = (end - start) * lengths[order[start]]
            if num_tokens > max_tokens and end - start > 1:
                break
            options.append((cost[start] + num_tokens + BATCH_OVERHEAD_TOKENS, start))
        best = min(options)
        cost.append(best[0])
        cut.append(best[1])
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, order[cut[end] : end])
        end = cut[end]
    return batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward: what the decoder reads, and where each row's tokens are in what it returns."""

    inputs: dict[str, Any]
    """Arguments of the decoder, on the CPU."""
    starts: list[tuple[int, int, int]]
    """For each row (start, length) of its prefix and the start of the rest, among all positions of the output."""

    def positions(self, b: int, start: int, end: int) -> list[int]:
        """Where tokens `start..end` (half-open) of row b are."""
        prefix_start, prefix_len, rest_start = self.starts[b]
        return [prefix_start + t if t < prefix_len else rest_start + t - prefix_len for t in range(start, end)]

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward computes, padding included."""
        return int(self.inputs["input_ids"].numel())


def make_batch(rows: Sequence[ScoringRow], layout: Layout) -> Batch:
    """Tensors of one batch of rows, each of which scores something; tokens after its last scored one are left out."""
    return _padded_batch(rows) if layout == "padded" else _packed_batch(rows, layout)


def _padded_batch(rows: Sequence[ScoringRow]) -> Batch:
    """No mask: attention is causal and the padding comes last, so no scored position sees it."""
    lengths = [input_len(row) for row in rows]
    input_ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids_BT[b, :length] = torch.tensor(row.token_ids[:length])
    return Batch({"input_ids": input_ids_BT}, [(0, 0, b * max(lengths)) for b in range(len(rows))])


def _packed_batch(rows: Sequence[ScoringRow], layout: Layout) -> Batch:
    lengths = [input_len(row) for row in rows]
    token_ids: list[int] = []
    position_ids: list[int] = []
    segment_lens: list[int] = []
    prefixes: list[int | None] = []
    starts = [(0, 0, 0)] * len(rows)

    def append(row: ScoringRow, start: int, end: int, prefix: int | None) -> None:
        if end > start:
            token_ids.extend(row.token_ids[start:end])
            position_ids.extend(range(start, end))
            segment_lens.append(end - start)
            prefixes.append(prefix)

    for prefix_len, members in _groups(rows, lengths, layout):
        prefix_start, prefix = len(token_ids), len(segment_lens) if prefix_len else None
        append(rows[members[0]], 0, prefix_len, None)
        for b in members:
            starts[b] = (prefix_start, prefix_len, len(token_ids))
            append(rows[b], prefix_len, lengths[b], prefix)
    inputs = {
        "input_ids": torch.tensor([token_ids]),
        "position_ids": torch.tensor([position_ids]),
        "attention_mask": torch.zeros(1, 1, 1, 1),  # of four dimensions: transformers then makes none of its own
        "packed": Segments(segment_lens, prefixes),
    }
    return Batch(inputs, starts)
