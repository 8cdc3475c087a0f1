"""Settings of the RLT reward. Names and defaults are those of the published code (SakanaAI/RLT, arXiv 2506.08388)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from schemas.values import NotEmpty, PositiveFloat, TemperatureFloat

Reduction = Literal["mean", "sum", "min", "max", "median", "first_quartile", "last_quartile"]
TokenFunction = Literal["exp", "exp_norm"]
Coefficient = Annotated[float, Field(ge=-1e6, le=1e6)]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    answer_log_prob_coeff: Coefficient | NotEmpty[Coefficient] = field(default_factory=lambda: [5.0, 0.05])
    """Weights a_k of the solution log-prob, one for each of `reduction_log_prob_fn`. Zeros skip the term."""
    reduction_log_prob_fn: Reduction | NotEmpty[Reduction] = field(default_factory=lambda: ["mean", "min"])
    """Reductions over the solution's tokens."""
    normalize_log_prob_fn: TokenFunction | None = None
    """Applied to each solution log-prob x: null x, `exp` exp(x), `exp_norm` 1 - exp(-x)."""
    clip_log_prob: PositiveFloat | None = 100000.0
    """Solution values are clamped from below at minus this, after the function above."""
    kl_penalty_reward_coeff: Coefficient | NotEmpty[Coefficient] = field(default_factory=lambda: [5.0, 0.05])
    """Weights b_k of the explanation's KL, one for each of `reduction_kl_fn`. Zeros skip the term and its forward."""
    reduction_kl_fn: Reduction | NotEmpty[Reduction] = field(default_factory=lambda: ["mean", "max"])
    """Reductions over the explanation's tokens."""
    normalize_kl_fn: TokenFunction | None = None
    """Applied to each per-token KL value, as above."""
    clip_kl: PositiveFloat | None = 100000.0
    """KL values are clamped from above at this, after the function above."""
    use_schulman_kl_estimation: bool = False
    """Per-token KL estimator: false k1 = log p_T - log p_S, true k3 = k1 - 1 + exp(-k1)."""
    include_teacher_think_entropy: bool = True
    """false drops the teacher's log-prob from the KL term (the penalty is then -log p_S)."""
    not_matched_penalty: Annotated[float, Field(ge=-1e6, le=0)] = -1.0
    """Added when the explanation is never closed; also stands in for the score of an empty explanation."""
    unbias_student_log_probs_temp: TemperatureFloat = 0.7
    """Temperature of the student's log-probs, solution and explanation alike."""
    unbias_teacher_log_probs: bool = True
    """Teacher log-probs at the sampling temperature; false: at temperature 1."""
    teacher_logprobs: Literal["sampler", "forward"] = "sampler"
    """Teacher log-probs of the explanation: those the sampler returned (free), or one more forward of the trainer."""
    extra_rewards: list[Literal["format", "correctness"]] = field(default_factory=list)
    """More reward functions (0 or 1 each) that TRL adds to the RLT reward, weighted by `reward_weights` [rlt, ...]."""

    def __post_init__(self) -> None:
        for coeff_name, reduction_name in (
            ("answer_log_prob_coeff", "reduction_log_prob_fn"),
            ("kl_penalty_reward_coeff", "reduction_kl_fn"),
        ):
            coeffs, reductions = as_list(getattr(self, coeff_name)), as_list(getattr(self, reduction_name))
            if len(coeffs) != len(reductions):
                raise ValueError(
                    f"`{coeff_name}` has {len(coeffs)} values and `{reduction_name}` has {len(reductions)}; each "
                    "reduction needs its weight. Give both lists the same length."
                )


def as_list(value: T | list[T]) -> list[T]:
    """A scalar as a list of one."""
    return value if isinstance(value, list) else [value]
