"""Micro-batches of a rollout: rows sorted by length under a token budget, weighted to one batch's loss.

TRL's loss of a micro-batch is a mean over rows, a mean over tokens, or a sum divided by the step's tokens
(`num_items_in_batch`). Weighted by `loss_weight`, the losses of the micro-batches of one step add up to the number that
TRL computes for all rows in one padded batch, and so do the gradients.

Letters: B rows of the rollout, b rows of a micro-batch, T tokens of its longest completion.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.types import Role
from rollout.batches import row_batches
from rollout.packed_attention import Layout
from rollout.types import Rollout, ScoringRow

LOSS_NORMALISATION: Mapping[str, Literal["rows", "tokens", "step"]] = {
    "grpo": "rows",
    "sapo": "rows",
    "dr_grpo": "rows",
    "luspo": "rows",
    "bnpo": "tokens",
    "dapo": "step",
    "cispo": "step",
    "vespo": "step",
}
"""TRL's `loss_type` -> what its loss of a batch is divided by (trl 1.16, `GRPOTrainer._compute_loss`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows of a rollout, each as long as their own longest completion."""

    rows: list[ScoringRow]
    """Prompt and completion; the span is the completion. In the order of the tensors' rows."""
    tensors: dict[str, Tensor]
    """The loss's inputs under TRL's names; `prompt_ids` have no width, since the rows above hold the prompts."""
    row_frac: float
    """Share of the step's rows."""
    token_frac: float
    """Share of the step's tokens that count in the loss."""

    def loss_weight(self, loss_type: str) -> float:
        """Factor of this micro-batch's loss."""
        return {"rows": self.row_frac, "tokens": self.token_frac, "step": 1.0}[LOSS_NORMALISATION[loss_type]]

    def pad(self, values_N: Tensor) -> Tensor:
        """[b, T] of what was computed for each completion token, row after row; 0 at padding."""
        is_token_bT = self.tensors["is_token"]
        return values_N.new_zeros(is_token_bT.shape).masked_scatter(is_token_bT, values_N)


def micro_batches(
    rollout: Rollout,
    max_tokens: int,
    *,
    device: torch.device,
    layout: Layout = "padded",
    mask_truncated: bool = False,
) -> Iterator[MicroBatch]:
    """Pack every row of a rollout once, at most `max_tokens` computed tokens at a time (a longer row goes alone).

    Args:
        rollout: with advantages; log-probs of `TEACHER` (old policy) and `REFERENCE` where the loss uses them.
        mask_truncated: completions that were cut off do not count in the loss.
    """
    rows, completions = rollout.rows, rollout.completions
    counted = [0 if mask_truncated and c.is_truncated else len(c.token_ids) for c in completions]
    num_counted = max(sum(counted), 1)
    assert rollout.advantages_B is not None
    per_token: dict[str, list[Tensor]] = {
        "completion_ids": [torch.tensor(c.token_ids) for c in completions],
        "completion_mask": [
            torch.full((len(c.token_ids),), int(n > 0)) for c, n in zip(completions, counted, strict=True)
        ],
        "is_token": [torch.ones(len(c.token_ids), dtype=torch.bool) for c in completions],
    }
    if all(c.logprobs is not None for c in completions):
        per_token["sampling_per_token_logps"] = [torch.tensor(c.logprobs, dtype=torch.float32) for c in completions]
    for role, name in ((Role.TEACHER, "old_per_token_logps"), (Role.REFERENCE, "ref_per_token_logps")):
        if role in rollout.logprobs:
            per_token[name] = rollout.logprobs[role]
    if rollout.importance_ratios is not None:
        per_token["importance_sampling_ratio"] = rollout.importance_ratios
    scoring_rows = [row.scoring_row for row in rows]
    for batch in row_batches(scoring_rows, max_tokens, layout):
        tensors = {
            name: torch.nn.utils.rnn.pad_sequence(
                [values[i] for i in batch], batch_first=True, padding_value=name == "importance_sampling_ratio"
            ).to(device)
            for name, values in per_token.items()
        }
        no_prompt = torch.empty(len(batch), 0, dtype=torch.long, device=device)
        tensors |= {
            "prompt_ids": no_prompt,
            "prompt_mask": no_prompt,
            "advantages": rollout.advantages_B[batch].to(device),
            "num_items_in_batch": torch.tensor(num_counted, device=device),
        }
        yield MicroBatch(
            rows=[scoring_rows[i] for i in batch],
            tensors=tensors,
            row_frac=len(batch) / len(rows),
            token_frac=sum(counted[i] for i in batch) / num_counted,
        )
