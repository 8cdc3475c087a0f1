"""Scores token by token: the values the reward is made of, on texts that join to the whole, for a bounded sample."""

from dataclasses import replace

import pytest
import torch

from core.types import Role
from data.formats import encode
from rollout.scoring import RolloutScorer
from rollout.token_scores import telling_rows, token_score_table
from rollout.types import Completion
from schemas.reward import RewardConfig
from tests.helpers.golden import golden_format, golden_tokenizer
from tests.helpers.rollouts import rollout_of

CLOSING = golden_format().tags.explanation.closing
TEXTS = ["plain words", "底辺 × 高さ 🙂👍🏽 naïve", "never closed", "x"]


def scored_rollout(config=None):
    """Completions of the texts, all but the third closed; log-probs are made up, another one for each token."""
    tokenizer = golden_tokenizer()
    ids = [encode(tokenizer, text + ("" if text == "never closed" else CLOSING)) for text in TEXTS]
    made_up = [[-0.01 * (i + t) for t in range(len(row))] for i, row in enumerate(ids)]
    rollout = rollout_of(["q"] * 4, ["the solution"] * 4, ids, made_up)

    def score(role, rows, temperature):
        assert role is Role.STUDENT
        return [tuple(-0.1 * torch.arange(1.0, end - start + 1) for start, end in row.spans) for row in rows]

    scorer = RolloutScorer(
        tokenizer=tokenizer,
        prompt_format=golden_format(),
        reward_config=config or RewardConfig(),
        sampling_temperature=1.0,
        score=score,
    )
    return rollout, scorer(rollout), scorer


def test_token_texts_join_to_the_explanation_and_values_make_up_the_terms():
    rollout, scored, scorer = scored_rollout()
    table = token_score_table(rollout, scored, scorer)
    assert sorted(table["row"]) == [0, 1, 2, 3]
    for place, i in enumerate(table["row"]):
        assert "".join(table["explanation_tokens"][place]) == TEXTS[i]
        assert "".join(table["solution_tokens"][place]) == "the solution"
        kl, log_prob = torch.tensor(table["explanation_kl"][place]), torch.tensor(table["solution_log_prob"][place])
        assert len(kl) == len(table["explanation_tokens"][place])
        assert len(log_prob) == len(table["solution_tokens"][place])
        terms = scored.breakdown.terms
        assert kl.mean() == pytest.approx(terms["unprocessed_thought_kl_mean"][i].item(), abs=1e-6)
        assert log_prob.mean() == pytest.approx(terms["unprocessed_answer_log_prob_mean"][i].item(), abs=1e-6)


def test_what_no_term_uses_is_left_empty():
    rollout, scored, scorer = scored_rollout(RewardConfig(kl_penalty_reward_coeff=[0.0, 0.0]))
    table = token_score_table(rollout, scored, scorer)
    assert table["explanation_kl"] == table["explanation_tokens"] == [[]] * 4
    assert all(table["solution_log_prob"])


@pytest.mark.parametrize("max_tokens", [0, 5, 20, 10_000])
def test_the_table_has_at_most_so_many_tokens_and_whole_rows(max_tokens):
    rollout, scored, scorer = scored_rollout()
    table = token_score_table(rollout, scored, scorer, max_tokens)
    count = sum(len(tokens) for name in ("explanation_tokens", "solution_tokens") for tokens in table[name])
    assert count <= max_tokens and len({len(values) for values in table.values()}) == 1
    assert (len(table["row"]) == 4) == (max_tokens == 10_000)


def test_the_best_and_the_worst_of_each_group_come_first():
    rollout = rollout_of(["a", "b"], ["s", "s"], [[1], [2]])
    completion = Completion(token_ids=[1], logprobs=None, finish_reason="stop")
    rollout = replace(rollout, groups=tuple(replace(group, completions=(completion,) * 3) for group in rollout.groups))
    assert telling_rows(rollout, [0.0, 2.0, 1.0, 5.0, 4.0, 3.0]) == [1, 3, 0, 5, 2, 4]
