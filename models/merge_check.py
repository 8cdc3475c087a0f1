"""LogprobCheck: whether a written checkpoint gives its own samples the log-probs that base and adapter gave them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from data.formats import encode
from models.evaluation import evaluation_mode

MAX_MEAN_NATS = 0.1
"""Above the mean difference of two 16-bit computations of one model (docs/measurements.md), below that of other weights
on a trained model."""
_ROUNDING_NATS = 0.04
"""Means below this are rounding (0.022 on the embedded model in bf16): what an adapter does must be more to be told."""
_NUM_NEW_TOKENS, _NUM_ROWS = 48, 4


@dataclass(frozen=True, kw_only=True)
class LogprobCheck:
    """Differences in nats per token between the trained model and the checkpoint that was written of it."""

    num_tokens: int
    mean_nats: float
    largest_nats: float
    adapter_nats: float | None
    """How far the base without its adapter is, in the mean; None: all weights were trained."""

    def __str__(self) -> str:
        adapter = "" if self.adapter_nats is None else f"; the base without its adapter: {self.adapter_nats:.4f} mean"
        return (
            f"{self.mean_nats:.4f} nats per token mean, {self.largest_nats:.4f} largest over {self.num_tokens} tokens"
            + adapter
        )

    def require(self) -> None:
        """
        Raises:
            UserError: the checkpoint is not the model that was trained.
        """
        limit = MAX_MEAN_NATS
        if self.adapter_nats is not None:
            limit = min(limit, max(self.adapter_nats / 2, _ROUNDING_NATS))
        if not self.mean_nats <= limit:  # nor NaN
            raise UserError(
                f"the merged model is {self} away from the one that was trained",
                expected=f"at most {limit:.4f} nats per token in the mean",
                remedy="use the adapter through peft (see the run's model card), and please report this",
            )


@dataclass(frozen=True)
class Probe:
    """Rows that the trained model wrote itself, and what it gave their tokens."""

    rows: list[list[int]]
    logprobs: Tensor
    """Of every token but the first of each row, one row behind the other."""
    adapter_nats: float | None

    @classmethod
    def of(cls, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> "Probe":
        """Let a model, with an adapter on it or not, go on with prompts."""
        rows = [_written(model, encode(tokenizer, prompt)) for prompt in prompts[:_NUM_ROWS]]
        logprobs = _logprobs(model, rows)
        if not hasattr(model, "disable_adapter"):
            return cls(rows, logprobs, None)
        with model.disable_adapter():
            bare = _logprobs(model, rows)
        return cls(rows, logprobs, (bare - logprobs).abs().mean().item())

    def check(self, model: Any) -> LogprobCheck:
        """How far a model's log-probs of the same rows are."""
        differences = (_logprobs(model, self.rows) - self.logprobs).abs()
        return LogprobCheck(
            num_tokens=differences.numel(),
            mean_nats=differences.mean().item(),
            largest_nats=differences.max().item(),
            adapter_nats=self.adapter_nats,
        )


@torch.no_grad()
def _written(model: Any, prompt_ids: list[int]) -> list[int]:
    """The prompt and the likeliest tokens behind it, past any end: what is compared needs no sense."""
    row = list(prompt_ids)
    with evaluation_mode(model):
        for _ in range(_NUM_NEW_TOKENS):
            logits = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits
            row.append(int(logits[0, -1].argmax()))
    return row


@torch.no_grad()
def _logprobs(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    found = []
    with evaluation_mode(model):
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(found)
