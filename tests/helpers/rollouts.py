"""Rollouts made by hand: one completion per question, of ids that a test chose."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rollout.types import Rollout, RolloutRow
from scoring.with_models import written_rollout
from tests.helpers.golden import golden_format, golden_tokenizer


def rollout_of(
    questions: Sequence[str],
    solutions: Sequence[str],
    completion_ids: Sequence[list[int]],
    sampler_logprobs: Sequence[list[float]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rollout:
    """Groups of one completion, with the golden tokenizer and format unless another tokenizer is given."""
    rollout = written_rollout(tokenizer or golden_tokenizer(), golden_format(), questions, solutions, completion_ids)
    if sampler_logprobs is None:
        return rollout
    groups = [
        replace(group, completions=(replace(group.completions[0], logprobs=values),))
        for group, values in zip(rollout.groups, sampler_logprobs, strict=True)
    ]
    return replace(rollout, groups=tuple(groups))


def row_of(
    question: str, solution: str, completion_ids: list[int], tokenizer: PreTrainedTokenizerBase | None = None
) -> RolloutRow:
    return rollout_of([question], [solution], [completion_ids], tokenizer=tokenizer).rows[0]
