"""Rollout, group and completion: one object that is filled on the way from sampling to the gradient.

Letters: P prompts, G completions per prompt, B = P * G rows (prompt-major), T tokens of one row, F reward functions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from core.types import Role
from rewards.rlt import RewardBreakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled row, e.g. `Completion(token_ids=[7, 9, 2], logprobs=[-0.1, -1.2, -0.3], finish_reason="stop")`."""

    token_ids: list[int]
    """[T] sampled ids, the stop id included where one was sampled."""
    logprobs: list[float] | None
    """[T] log-prob of each sampled id under the sampling distribution (temperature applied), in nats; None for a text
    that was not sampled."""
    finish_reason: Literal["stop", "length"]
    seed: int | None = None
    """What it was drawn with; None where the sampler takes no seed per row."""

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A question with its prompt and the completions that were sampled for it. Advantages compare within a group."""

    question: str
    solution: str
    prompt_ids: list[int]
    """The teacher's prompt, tokenised when the dataset was prepared."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The dataset row's other columns, for reward functions and the completions file."""
    completions: tuple[Completion, ...] = ()

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Group":
        """A row of a prepared dataset, without completions yet."""
        own = ("question", "solution", "prompt_ids")
        columns = {name: value for name, value in row.items() if name not in own}
        return cls(
            question=row["question"], solution=row["solution"], prompt_ids=list(row["prompt_ids"]), columns=columns
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """One completion with the group that it belongs to."""

    group: Group
    completion: Completion

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion."""
        return self.group.prompt_ids + self.completion.token_ids

    @property
    def scoring_row(self) -> "ScoringRow":
        """Prompt and completion; the completion is scored, the prompt is what a group has in common."""
        start = len(self.group.prompt_ids)
        return ScoringRow(token_ids=self.token_ids, spans=(self.completion_span,), prefix_len=start)

    @property
    def completion_span(self) -> tuple[int, int]:
        """Where the completion lies in `token_ids`, half-open."""
        start = len(self.group.prompt_ids)
        return start, start + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The completions of one optimizer step. Each stage returns a copy with its fields filled."""

    groups: tuple[Group, ...]
    logprobs: Mapping[Role, list[Tensor]] = field(default_factory=dict)
    """[B] of [T] log-probs of the completions at the sampling temperature, float32 on the CPU: `TEACHER` is the policy
    that the step starts from, `REFERENCE` the frozen one. Absent where nothing uses them."""
    importance_ratios: list[Tensor] | None = None
    """[B] of [T] (or [1]) weights `p_trainer / p_sampler` of the completions' tokens; None: not corrected for."""
    breakdown: RewardBreakdown | None = None
    """The RLT reward and its terms, [B] each."""
    rewards_BF: Tensor | None = None
    """One column per reward function, the RLT reward first; NaN where a function gives none."""
    advantages_B: Tensor | None = None

    @property
    def rows(self) -> list[RolloutRow]:
        return [RolloutRow(group=group, completion=completion) for group, completion in self._pairs()]

    @property
    def completions(self) -> list[Completion]:
        return [completion for _, completion in self._pairs()]

    def _pairs(self) -> Iterator[tuple[Group, Completion]]:
        return ((group, completion) for group in self.groups for completion in group.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRow:
    """Token ids and the spans in them whose log-probs are wanted. Spans are half-open `(start, end)` and start >= 1."""

    token_ids: list[int]
    spans: tuple[tuple[int, int], ...]
    prefix_len: int = 0
    """Leading tokens that the rows of a group have in common; a packed batch computes them once."""
