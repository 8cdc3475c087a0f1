"""The reward equals the published implementation's on two tiny models (float32, eager attention)."""

import hashlib
from collections.abc import Sequence

import pytest
import torch

from core.types import Role
from data.formats import encode
from rewards import RewardBreakdown
from rollout.logprobs import score_spans
from rollout.scoring import RolloutScorer
from rollout.spans import RowBuilder
from rollout.types import ScoringRow
from schemas.reward import RewardConfig
from scoring.with_models import score_with_models
from tests.helpers.golden import GOLDEN_FOLDER, golden_data, golden_format, golden_model, golden_tokenizer
from tests.helpers.rollouts import rollout_of, row_of

TOLERANCE = 1e-4
# The k3 estimate holds exponentials of log-prob differences. From about 30 on a term's sixth digit is float32's: the
# largest one, 740.161, moves by 0.001 from one CPU to another.
RELATIVE_TOLERANCE = 3e-6
CASES = golden_data()["cases"]
INPUTS = [case["input"] for case in CASES]
QUESTIONS = [case["question"] for case in INPUTS]
SOLUTIONS = [case["solution"] for case in INPUTS]

RUN = {"answer_log_prob_coeff": [1.0, 0.01], "kl_penalty_reward_coeff": [3.0, 0.03]}
VARIANTS = {
    "mean_only": {
        "answer_log_prob_coeff": 1.0,
        "kl_penalty_reward_coeff": 3.0,
        "reduction_log_prob_fn": "mean",
        "reduction_kl_fn": "mean",
    },
    "reward_cfg": {},
    "run_cfg": RUN,
    "run_cfg_exp_norms": RUN | {"normalize_log_prob_fn": "exp", "normalize_kl_fn": "exp_norm"},
    "run_cfg_no_teacher_entropy": RUN | {"include_teacher_think_entropy": False},
    "run_cfg_schulman": RUN | {"use_schulman_kl_estimation": True},
    "run_cfg_temperature_1": RUN | {"unbias_student_log_probs_temp": 1.0, "unbias_teacher_log_probs": False},
}


def score(role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[torch.Tensor, ...]]:
    return score_spans(golden_model(role), rows, temperature=temperature)


def assert_golden(breakdown: RewardBreakdown, variant: str) -> None:
    terms = {"reward": breakdown.reward, **breakdown.terms}
    for row, case in enumerate(CASES):
        for name, expected in case["variants"][variant].items():
            wanted = pytest.approx(expected, abs=TOLERANCE, rel=RELATIVE_TOLERANCE)
            assert terms[name][row].item() == wanted, (case["name"], name)


def test_every_published_variant_is_checked() -> None:
    assert set(VARIANTS) == set(golden_data()["variants"])
    assert (
        hashlib.sha256((GOLDEN_FOLDER / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
        == (golden_data()["assets"]["sha256"]["tokenizer/tokenizer.json"])
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_score_as_published_in_one_batch(variant: str) -> None:
    breakdown = score_with_models(
        QUESTIONS,
        SOLUTIONS,
        [case["completion_text"] for case in INPUTS],
        teacher=golden_model("teacher"),
        student=golden_model("student"),
        tokenizer=golden_tokenizer(),
        prompt_format=golden_format(),
        reward_config=RewardConfig(**VARIANTS[variant]),
        temperature=golden_data()["temperature"],
        close_explanations=False,
    )
    assert_golden(breakdown, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampled_ids_score_as_published_with_a_teacher_forward(variant: str) -> None:
    scorer = RolloutScorer(
        tokenizer=golden_tokenizer(),
        prompt_format=golden_format(),
        reward_config=RewardConfig(teacher_logprobs="forward", **VARIANTS[variant]),
        sampling_temperature=golden_data()["temperature"],
        score=score,
    )
    rollout = rollout_of(QUESTIONS, SOLUTIONS, [case["completion_ids"] for case in INPUTS])
    assert_golden(scorer(rollout, every_term=True).breakdown, variant)


def test_sampler_logprobs_replace_the_teacher_forward() -> None:
    def score_student_only(
        role: Role, rows: Sequence[ScoringRow], temperature: float
    ) -> list[tuple[torch.Tensor, ...]]:
        assert role == Role.STUDENT
        return score(role, rows, temperature)

    prompts = [encode(golden_tokenizer(), case["prompt"]) for case in INPUTS]
    rows = [
        ScoringRow(
            token_ids=prompt + case["completion_ids"],
            spans=((len(prompt), len(prompt) + len(case["completion_ids"])),),
        )
        for prompt, case in zip(prompts, INPUTS, strict=True)
    ]
    sampler_logprobs = [spans[0].tolist() for spans in score(Role.TEACHER, rows, golden_data()["temperature"])]
    scorer = RolloutScorer(
        tokenizer=golden_tokenizer(),
        prompt_format=golden_format(),
        reward_config=RewardConfig(**RUN),
        sampling_temperature=golden_data()["temperature"],
        score=score_student_only,
    )
    rollout = rollout_of(QUESTIONS, SOLUTIONS, [case["completion_ids"] for case in INPUTS], sampler_logprobs)
    assert_golden(scorer(rollout).breakdown, "run_cfg")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rows_and_spans_are_the_published_ones(case: dict) -> None:
    given, detail = case["input"], case["detail"]
    row = RowBuilder(golden_tokenizer(), golden_format()).build(
        row_of(given["question"], given["solution"], given["completion_ids"])
    )
    assert row.student.token_ids == detail["student_ids"]
    assert row.student.spans == (tuple(detail["student_solution_span"]), tuple(detail["student_thought_span"]))
    assert row.teacher.spans == (tuple(detail["teacher_thought_span"]),)
    start, end = row.teacher.spans[0]
    assert row.teacher.token_ids[:end] == detail["teacher_ids"][:end]
    assert given["completion_ids"][row.explanation_slice] == row.teacher.token_ids[start:end]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_prompt_is_the_published_one(case: dict) -> None:
    given = case["input"]
    text = golden_format().teacher_prompt_text(golden_tokenizer(), given["question"], given["solution"])
    assert text == given["prompt"]
