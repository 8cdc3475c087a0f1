"""RolloutScorer: rewards of completions (build rows, have them scored, combine). Holds no model and no trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.types import Role
from data.formats import PromptFormat
from rewards.rlt import RewardBreakdown, RLTReward
from rollout.spans import ExplanationRow, RowBuilder
from rollout.types import Rollout, ScoringRow
from schemas.reward import RewardConfig


class SpanScorer(Protocol):
    """Log-probs of the rows' spans under the model of a role, as `rollout.logprobs.score_spans` returns them."""

    def __call__(self, role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[Tensor, ...]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    breakdown: RewardBreakdown
    rows: list[ExplanationRow]
    """What was scored: explanation texts, whether they were closed, and which sampled tokens they are."""
    solution_logprobs: list[Tensor] | None = None
    """[B] of [T] student's log-probs of the solutions; None where no term uses them, here and below."""
    student_explanation_logprobs: list[Tensor] | None = None
    teacher_explanation_logprobs: list[Tensor] | None = None


def check_scoring(config: RewardConfig, sampling_temperature: float, *, shares_tokens: bool) -> None:
    """Refuse reward settings that cannot work, before a model is loaded.

    Raises:
        UserError: the KL term is on although the models' tokenizers differ, or sampler log-probs are wanted at another
            temperature than theirs.
    """
    reward = RLTReward(config)
    if reward.needs_kl and not shares_tokens:
        raise UserError(
            "teacher and student have different tokenizers, and `kl_penalty_reward_coeff` is not zero",
            expected="one tokenizer: the KL term compares both models token by token",
            remedy="choose a student of the teacher's family, or set kl_penalty_reward_coeff=[0,0]",
        )
    uses_sampler = reward.needs_teacher and config.teacher_logprobs == "sampler"
    if uses_sampler and not config.unbias_teacher_log_probs and sampling_temperature != 1.0:
        raise UserError(
            f"`unbias_teacher_log_probs` is false with `teacher_logprobs` sampler at temperature "
            f"{sampling_temperature}: the sampler's log-probs are at that temperature, not at 1",
            expected="teacher log-probs at the temperature that they are wanted at",
            remedy="set teacher_logprobs=forward or unbias_teacher_log_probs=true",
        )


class RolloutScorer:
    """RLT rewards of sampled completions.

    `sampling_temperature` is the temperature at which the completions were drawn. `student_tokenizer: None` means that
    the student reads the teacher's tokens and chat template.

    Raises:
        UserError: see `check_scoring`.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        reward_config: RewardConfig,
        sampling_temperature: float,
        score: SpanScorer,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.reward = RLTReward(reward_config)
        self.config = reward_config
        self.format = prompt_format
        self._builder = RowBuilder(tokenizer, prompt_format, student_tokenizer)
        self.solution_token_texts = self._builder.solution_token_texts
        self.explanation_token_texts = self._builder.explanation_token_texts
        self._score = score
        self._sampling_temperature = sampling_temperature
        self._teacher_temperature = sampling_temperature if reward_config.unbias_teacher_log_probs else 1.0
        check_scoring(reward_config, sampling_temperature, shares_tokens=self._builder.shares_tokens)

    def __call__(self, rollout: Rollout, *, every_term: bool = False) -> ScoredRollout:
        """Rewards of the B completions of a rollout.

        Args:
            every_term: also score what only zero coefficients or a switched-off teacher term would use (by a forward).

        Raises:
            UserError: sampler log-probs are wanted and were not given, or a solution has no token of its own.
            NonFiniteError: a log-prob is not finite.
        """
        rows = [self._builder.build(row) for row in rollout.rows]
        use_solution = self.reward.needs_solution or every_term
        use_kl = self.reward.needs_kl or (every_term and self._builder.shares_tokens)
        solution, student = self._student_logprobs(rows, use_solution, use_kl)
        teacher = self._teacher_logprobs(rows, rollout, every_term) if use_kl else None
        breakdown = self.reward(
            matched=[row.matched for row in rows],
            solution_logprobs=solution,
            student_explanation_logprobs=student,
            teacher_explanation_logprobs=teacher,
        )
        return ScoredRollout(
            breakdown=breakdown,
            rows=rows,
            solution_logprobs=solution,
            student_explanation_logprobs=student,
            teacher_explanation_logprobs=teacher,
        )

    def _student_logprobs(
        self, rows: list[ExplanationRow], use_solution: bool, use_kl: bool
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Solution and explanation log-probs from one forward of the student, over the spans that are used."""
        if not use_solution and not use_kl:
            return None, None
        wanted = slice(0 if use_solution else 1, 2 if use_kl else 1)
        student_rows = [replace(row.student, spans=row.student.spans[wanted]) for row in rows]
        scored = self._score(Role.STUDENT, student_rows, self.config.unbias_student_log_probs_temp)
        return (
            [spans[0] for spans in scored] if use_solution else None,
            [spans[-1] for spans in scored] if use_kl else None,
        )

    def _teacher_logprobs(self, rows: list[ExplanationRow], rollout: Rollout, every_term: bool) -> list[Tensor] | None:
        """The policy's log-probs of each explanation: the sampler's, those the rollout has already, or a forward's."""
        sampler_logprobs = [c.logprobs for c in rollout.completions if c.logprobs is not None]
        if self.config.teacher_logprobs == "sampler" and len(sampler_logprobs) == len(rows):
            return [
                torch.tensor(logprobs[row.explanation_slice], dtype=torch.float32)
                for row, logprobs in zip(rows, sampler_logprobs, strict=True)
            ]
        if not self.reward.needs_teacher and not every_term:
            return None
        if self.config.teacher_logprobs == "sampler":
            raise UserError(
                "`teacher_logprobs` is sampler, and the sampler returned no log-probs",
                expected="one log-prob for each sampled token",
                remedy="set teacher_logprobs=forward",
            )
        if Role.TEACHER in rollout.logprobs and self._teacher_temperature == self._sampling_temperature:
            policy = rollout.logprobs[Role.TEACHER]
            return [logprobs_T[row.explanation_slice] for row, logprobs_T in zip(rows, policy, strict=True)]
        scored = self._score(Role.TEACHER, [row.teacher for row in rows], self._teacher_temperature)
        return [spans[0] for spans in scored]
