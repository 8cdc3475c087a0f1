"""Rollouts made by hand: one completion per question, of ids that a test chose."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from data.formats import encode
from rollout.types import Completion, Group, Rollout, RolloutRow
from tests.helpers.golden import golden_format, golden_tokenizer


def rollout_of(
    questions: Sequence[str],
    solutions: Sequence[str],
    completion_ids: Sequence[list[int]],
    sampler_logprobs: Sequence[list[float]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rollout:
    """Groups of one completion, with the golden tokenizer and format unless another tokenizer is given."""
    tokenizer = tokenizer or golden_tokenizer()
    logprobs = sampler_logprobs if sampler_logprobs is not None else [None] * len(completion_ids)
    return Rollout(
        groups=tuple(
            Group(
                question=question,
                solution=solution,
                prompt_ids=encode(tokenizer, golden_format().teacher_prompt_text(tokenizer, question, solution)),
                completions=(Completion(token_ids=ids, logprobs=values, finish_reason="stop"),),
            )
            for question, solution, ids, values in zip(questions, solutions, completion_ids, logprobs, strict=True)
        )
    )


def row_of(
    question: str, solution: str, completion_ids: list[int], tokenizer: PreTrainedTokenizerBase | None = None
) -> RolloutRow:
    return rollout_of([question], [solution], [completion_ids], tokenizer=tokenizer).rows[0]
