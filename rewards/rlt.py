"""The reward of Reinforcement Learning Teachers (arXiv 2506.08388, SakanaAI/RLT `TeacherKLBasedReward`), as a formula.

    A_t = log p_S(solution token t | student's chat up to it)            t over the solution
    K_t = log p_T(explanation token t) - log p_S(same token)             t over the explanation
    r   = sum_k a_k reduce_k(f(A)) - sum_k b_k reduce_k(g(K)) + match

Letters: B rows, T tokens of one row. Rows are ragged: one [T] tensor each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import NonFiniteError, UserError
from rewards.reductions import reduce_rows
from schemas.reward import Reduction, RewardConfig, as_list


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBreakdown:
    """The reward and every term of it, [B] each, float32 on the CPU.

    Names of the terms are those that the published code logs: `answer_log_prob_<reduction>` and
    `reasoning_kl_<reduction>` before the coefficients, `solution_log_prob_reward`, `kl_reward` (its sign included) and
    `match_reward` as they are added; `*_no_entropy` without the teacher's log-prob. `unprocessed_*` are means over the
    tokens before f, g and the k3 estimator. `matched` is 1 where the explanation was closed. A term whose log-probs
    were not given is absent.
    """

    reward: Tensor
    terms: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Mean over the rows of the reward and of every term (over the rows that have one, for `unprocessed_*`)."""
        return {name: values_B.nanmean().item() for name, values_B in {"reward": self.reward, **self.terms}.items()}


class RLTReward:
    """RLT reward from given log-probs. Holds no model; the same log-probs give the same reward."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.answer_coeffs = as_list(config.answer_log_prob_coeff)
        self.kl_coeffs = as_list(config.kl_penalty_reward_coeff)
        self.answer_reductions: list[Reduction] = as_list(config.reduction_log_prob_fn)
        self.kl_reductions: list[Reduction] = as_list(config.reduction_kl_fn)

    @property
    def needs_solution(self) -> bool:
        return any(self.answer_coeffs)

    @property
    def needs_kl(self) -> bool:
        return any(self.kl_coeffs)

    @property
    def needs_teacher(self) -> bool:
        return self.needs_kl and self.config.include_teacher_think_entropy

    def __call__(
        self,
        *,
        matched: Sequence[bool],
        solution_logprobs: Sequence[Tensor] | None = None,
        student_explanation_logprobs: Sequence[Tensor] | None = None,
        teacher_explanation_logprobs: Sequence[Tensor] | None = None,
    ) -> RewardBreakdown:
        """Rewards of B rows. Log-probs that only zero coefficients use may be None.

        An empty explanation has the score `-not_matched_penalty` in place of every reduction of its KL, that is, with
        the defaults it costs b_1 + b_2.

        Raises:
            NonFiniteError: a log-prob or a reward is not finite; the message names the row.
            UserError: a solution without tokens.
            ValueError: log-probs that a coefficient needs are missing, or teacher and student rows differ in length.
        """
        self._check(matched, solution_logprobs, student_explanation_logprobs, teacher_explanation_logprobs)
        matched_B = torch.tensor([bool(flag) for flag in matched])
        terms = {
            "matched": matched_B.float(),
            "match_reward": torch.where(matched_B, 0.0, self.config.not_matched_penalty),
        }
        reward_B = terms["match_reward"].clone()
        if solution_logprobs is not None:
            terms |= self._solution_terms(solution_logprobs)
            reward_B += terms["solution_log_prob_reward"]
        if student_explanation_logprobs is not None:
            kl_terms = self._kl_terms(student_explanation_logprobs, teacher_explanation_logprobs)
            no_entropy_B = reward_B + kl_terms["kl_reward_no_entropy"]
            if self.needs_teacher:
                reward_B = reward_B + kl_terms["kl_reward"]
            elif self.needs_kl:
                reward_B = no_entropy_B
            terms |= kl_terms | {"reward_no_entropy": no_entropy_B}
        _require_finite("reward", list(reward_B))
        return RewardBreakdown(reward=reward_B, terms=terms)

    def _solution_terms(self, logprobs: Sequence[Tensor]) -> dict[str, Tensor]:
        values = [_apply(self.config.normalize_log_prob_fn, row_T.float()) for row_T in logprobs]
        if self.config.clip_log_prob is not None:
            values = [row_T.clamp(min=-self.config.clip_log_prob) for row_T in values]
        scores = {name: reduce_rows(name, values) for name in self.answer_reductions}
        terms = {f"answer_log_prob_{name}": score_B for name, score_B in scores.items()}
        weighted = [c * scores[name] for c, name in zip(self.answer_coeffs, self.answer_reductions, strict=True)]
        terms["solution_log_prob_reward"] = torch.stack(weighted).sum(0)
        terms["unprocessed_answer_log_prob_mean"] = reduce_rows("mean", logprobs).float()
        return terms

    def _kl_terms(self, student: Sequence[Tensor], teacher: Sequence[Tensor] | None) -> dict[str, Tensor]:
        """The k3 estimator needs both models, so it does not touch the variant without the teacher."""
        no_entropy = [-row_T.float() for row_T in student]
        terms, terms["kl_reward_no_entropy"] = self._reduce_kl("reasoning_kl_no_entropy", no_entropy)
        if teacher is None:
            return terms
        kl = [t.float() - s.float() for t, s in zip(teacher, student, strict=True)]
        terms["unprocessed_thought_kl_mean"] = torch.stack([row_T.mean() for row_T in kl])
        if self.config.use_schulman_kl_estimation:
            kl = [row_T - 1 + torch.exp(-row_T) for row_T in kl]
        with_teacher, kl_reward_B = self._reduce_kl("reasoning_kl", kl)
        return terms | with_teacher | {"kl_reward": kl_reward_B}

    def _reduce_kl(self, prefix: str, kl: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """One [B] score per reduction, and minus their weighted sum."""
        values = [_apply(self.config.normalize_kl_fn, row_T) for row_T in kl]
        if self.config.clip_kl is not None:
            values = [row_T.clamp(max=self.config.clip_kl) for row_T in values]
        empty_score = torch.tensor([-self.config.not_matched_penalty])
        values = [row_T if row_T.numel() else empty_score for row_T in values]
        scores = {name: reduce_rows(name, values) for name in self.kl_reductions}
        weighted = [c * scores[name] for c, name in zip(self.kl_coeffs, self.kl_reductions, strict=True)]
        return {f"{prefix}_{name}": score_B for name, score_B in scores.items()}, -torch.stack(weighted).sum(0)

    def _check(
        self,
        matched: Sequence[bool],
        solution: Sequence[Tensor] | None,
        student: Sequence[Tensor] | None,
        teacher: Sequence[Tensor] | None,
    ) -> None:
        for needed, logprobs, name in (
            (self.needs_solution, solution, "solution"),
            (self.needs_kl, student, "student's explanation"),
            (self.needs_teacher, teacher, "teacher's explanation"),
        ):
            if needed and logprobs is None:
                raise ValueError(f"the {name} log-probs are missing, and a non-zero coefficient needs them")
            if logprobs is not None and len(logprobs) != len(matched):
                raise ValueError(f"{len(logprobs)} rows of {name} log-probs for {len(matched)} rows")
            if logprobs is not None:
                _require_finite(f"{name} log-probs", logprobs)
        for row, values_T in enumerate(solution or ()):
            if not values_T.numel():
                raise UserError(
                    f"row {row} has an empty solution", expected="a solution with tokens", remedy="remove the row"
                )
        for row, (t, s) in enumerate(zip(teacher or (), student or (), strict=False)):
            if t.shape != s.shape:
                raise ValueError(f"row {row}: {len(t)} teacher and {len(s)} student log-probs of one explanation")


def _apply(function_name: str | None, values_T: Tensor) -> Tensor:
    match function_name:
        case None:
            return values_T
        case "exp":
            return torch.exp(values_T)
        case "exp_norm":
            return 1 - torch.exp(-values_T)
    raise ValueError(f"unknown function {function_name!r}")


def _require_finite(what: str, rows: Sequence[Tensor]) -> None:
    for row, values in enumerate(rows):
        bad = ~torch.isfinite(values)
        if bad.any():
            where = f" at token {int(bad.nonzero()[0, 0])}" if values.dim() else ""
            raise NonFiniteError(f"{what} of row {row}: {values[bad].flatten()[0].item()}{where}")
