"""Properties of the reward formula; its numbers are held to the published ones in test_golden_rewards.py."""

import math

import pytest
import torch

from core.errors import NonFiniteError, UserError
from rewards import RLTReward
from rewards.reductions import REDUCTIONS, reduce_rows
from schemas.reward import RewardConfig

SOLUTION = [torch.tensor([-1.0, -3.0]), torch.tensor([-0.5])]
STUDENT = [torch.tensor([-2.0, -4.0, -1.0]), torch.tensor([-1.0, -1.5])]
TEACHER = [torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -1.0])]
CONFIG = {"answer_log_prob_coeff": [1.0, 0.1], "kl_penalty_reward_coeff": [3.0, 0.5]}


def reward_of(config: RewardConfig, **changes):
    given = {
        "matched": [True] * 2,
        "solution_logprobs": SOLUTION,
        "student_explanation_logprobs": STUDENT,
        "teacher_explanation_logprobs": TEACHER,
    }
    return RLTReward(config)(**(given | changes))


def test_formula_by_hand() -> None:
    # row 0: A = (-1, -3), K = (1, 3, 0);  row 1: A = (-0.5), K = (-1, 0.5)
    result = reward_of(RewardConfig(**CONFIG))
    expected = [-2 + 0.1 * -3 - 3 * 4 / 3 - 0.5 * 3, -0.5 + 0.1 * -0.5 + 3 * 0.25 - 0.5 * 0.5]
    assert result.reward.tolist() == pytest.approx(expected)
    no_entropy = [-2.3 - 3 * 7 / 3 - 0.5 * 4, -0.55 - 3 * 1.25 - 0.5 * 1.5]
    assert result.terms["reward_no_entropy"].tolist() == pytest.approx(no_entropy)
    assert result.means()["reward"] == pytest.approx(sum(expected) / 2)


def test_each_row_is_scored_on_its_own() -> None:
    both = reward_of(RewardConfig(**CONFIG))
    for row in range(2):
        alone = RLTReward(RewardConfig(**CONFIG))(
            matched=[True],
            solution_logprobs=SOLUTION[row : row + 1],
            student_explanation_logprobs=STUDENT[row : row + 1],
            teacher_explanation_logprobs=TEACHER[row : row + 1],
        )
        assert alone.reward[0] == both.reward[row]


def test_reward_rises_with_the_solution_and_falls_with_the_divergence() -> None:
    base = reward_of(RewardConfig(**CONFIG)).reward
    likelier = reward_of(RewardConfig(**CONFIG), solution_logprobs=[row + 0.1 for row in SOLUTION]).reward
    stranger = reward_of(RewardConfig(**CONFIG), teacher_explanation_logprobs=[row + 0.1 for row in TEACHER]).reward
    assert (likelier > base).all() and (stranger < base).all()


def test_an_unclosed_explanation_costs_the_penalty() -> None:
    config = RewardConfig(**CONFIG, not_matched_penalty=-2.5)
    difference = reward_of(config, matched=[False, True]).reward - reward_of(config).reward
    assert difference.tolist() == pytest.approx([-2.5, 0.0])


@pytest.mark.parametrize("include_teacher", [True, False])
def test_an_empty_explanation_costs_the_kl_coefficients_with_and_without_the_teacher_term(
    include_teacher: bool,
) -> None:
    config = RewardConfig(**CONFIG, include_teacher_think_entropy=include_teacher)
    empty = [torch.empty(0), torch.empty(0)]
    result = reward_of(config, student_explanation_logprobs=empty, teacher_explanation_logprobs=empty)
    assert (result.reward - result.terms["solution_log_prob_reward"]).tolist() == pytest.approx([-3.5, -3.5])
    assert result.terms["reasoning_kl_mean"].tolist() == [1.0, 1.0]


def test_an_empty_explanation_does_not_touch_its_neighbours() -> None:
    mixed = reward_of(
        RewardConfig(**CONFIG),
        student_explanation_logprobs=[torch.empty(0), STUDENT[1]],
        teacher_explanation_logprobs=[torch.empty(0), TEACHER[1]],
    )
    assert mixed.reward[1] == reward_of(RewardConfig(**CONFIG)).reward[1]
    assert math.isfinite(mixed.means()["unprocessed_thought_kl_mean"])


@pytest.mark.parametrize("zero", [0.0, [0.0, 0.0]])
def test_zero_coefficients_need_no_logprobs(zero: float | list[float]) -> None:
    reductions = "mean" if zero == 0.0 else ["mean", "max"]
    no_kl = RLTReward(RewardConfig(kl_penalty_reward_coeff=zero, reduction_kl_fn=reductions))
    assert not no_kl.needs_kl and not no_kl.needs_teacher
    result = no_kl(matched=[True, True], solution_logprobs=SOLUTION)
    assert torch.equal(result.reward, result.terms["solution_log_prob_reward"])
    no_solution = RLTReward(RewardConfig(answer_log_prob_coeff=zero, reduction_log_prob_fn=reductions))
    result = no_solution(
        matched=[True, True], student_explanation_logprobs=STUDENT, teacher_explanation_logprobs=TEACHER
    )
    assert torch.equal(result.reward, result.terms["kl_reward"])


def test_without_the_teacher_term_no_teacher_logprobs_are_needed() -> None:
    config = RewardConfig(**CONFIG, include_teacher_think_entropy=False)
    without = reward_of(config, teacher_explanation_logprobs=None)
    assert torch.equal(without.reward, reward_of(config).reward)
    assert "kl_reward" not in without.terms


@pytest.mark.parametrize(
    "missing", ["solution_logprobs", "student_explanation_logprobs", "teacher_explanation_logprobs"]
)
def test_missing_logprobs_are_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="missing"):
        reward_of(RewardConfig(**CONFIG), **{missing: None})


def test_clips_bound_each_token_before_the_reduction() -> None:
    config = RewardConfig(**CONFIG, clip_log_prob=2.0, clip_kl=0.75)
    terms = reward_of(config).terms
    assert terms["answer_log_prob_mean"].tolist() == pytest.approx([(-1 - 2) / 2, -0.5])
    assert terms["reasoning_kl_mean"].tolist() == pytest.approx([(0.75 + 0.75 + 0) / 3, (-1 + 0.5) / 2])
    unclipped = reward_of(RewardConfig(**CONFIG, clip_log_prob=None, clip_kl=None)).terms
    assert unclipped["reasoning_kl_max"].tolist() == [3.0, 0.5]


def test_token_functions_apply_before_the_reduction() -> None:
    terms = reward_of(RewardConfig(**CONFIG, normalize_log_prob_fn="exp", normalize_kl_fn="exp_norm")).terms
    assert terms["answer_log_prob_mean"][0].item() == pytest.approx((math.exp(-1) + math.exp(-3)) / 2)
    assert terms["reasoning_kl_max"][1].item() == pytest.approx(1 - math.exp(-0.5))
    assert terms["unprocessed_answer_log_prob_mean"].tolist() == [-2.0, -0.5]
    assert terms["unprocessed_thought_kl_mean"].tolist() == pytest.approx([4 / 3, -0.25])


def test_k3_is_never_negative_and_zero_only_where_the_models_agree() -> None:
    config = RewardConfig(kl_penalty_reward_coeff=1.0, reduction_kl_fn="min", use_schulman_kl_estimation=True)
    minimum = reward_of(config).terms["reasoning_kl_min"]
    assert minimum[0] == 0 and minimum[1] > 0


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_those_of_the_sorted_values(name: str) -> None:
    rows = [torch.tensor([4.0, 1.0, 3.0, 0.0, 2.0]), torch.tensor([-7.0])]
    by_hand = {"mean": 2, "sum": 10, "min": 0, "max": 4, "median": 2, "first_quartile": 1, "last_quartile": 3}
    assert reduce_rows(name, rows).tolist() == [by_hand[name], -7.0]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("which", ["solution_logprobs", "student_explanation_logprobs", "teacher_explanation_logprobs"])
def test_a_non_finite_logprob_stops_and_names_the_row(bad: float, which: str) -> None:
    rows = {
        "solution_logprobs": SOLUTION,
        "student_explanation_logprobs": STUDENT,
        "teacher_explanation_logprobs": TEACHER,
    }[which]
    broken = [rows[0], rows[1].clone()]
    broken[1][-1] = bad
    with pytest.raises(NonFiniteError, match=f"row 1.* at token {len(broken[1]) - 1}"):
        reward_of(RewardConfig(**CONFIG), **{which: broken})


def test_a_reward_that_overflows_stops() -> None:
    far = [torch.full((3,), -500.0), TEACHER[1]]
    with pytest.raises(NonFiniteError, match="reward of row 0"):
        reward_of(RewardConfig(**CONFIG, normalize_kl_fn="exp_norm"), teacher_explanation_logprobs=far)


def test_an_empty_solution_is_an_error_of_the_data() -> None:
    with pytest.raises(UserError, match="row 1 has an empty solution"):
        reward_of(RewardConfig(**CONFIG), solution_logprobs=[SOLUTION[0], torch.empty(0)])
