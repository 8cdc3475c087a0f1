"""Token by token scores of a sample of a rollout's rows, as a table; the values are those that the reward is made of.

Letters: B rows, T tokens.
"""

from itertools import zip_longest
from typing import Any

from rollout.scoring import RolloutScorer, ScoredRollout
from rollout.types import Rollout

MAX_TOKENS_A_TABLE = 32_768


def token_score_table(
    rollout: Rollout, scored: ScoredRollout, scorer: RolloutScorer, max_tokens: int = MAX_TOKENS_A_TABLE
) -> dict[str, list[Any]]:
    """Columns as in `runs.token_scores`, for as many rows as `max_tokens` allow.

    Rows are taken in the order of `telling_rows`. The KL of a token is `log p_teacher - log p_student`, before the
    reward's clipping and estimator; it is empty where no term of the reward compares the two models.
    """
    table: dict[str, list[Any]] = {
        name: [] for name in ("row", "solution_tokens", "solution_log_prob", "explanation_tokens", "explanation_kl")
    }
    rows, completions, left = scored.rows, rollout.completions, max_tokens
    for i in telling_rows(rollout, scored.breakdown.reward.tolist()):
        start, end = rows[i].student.spans[0]
        solution_ids = rows[i].student.token_ids[start:end] if scored.solution_logprobs is not None else []
        compared = scored.student_explanation_logprobs is not None and scored.teacher_explanation_logprobs is not None
        explanation_ids = completions[i].token_ids[rows[i].explanation_slice] if compared else []
        if len(solution_ids) + len(explanation_ids) > left:
            continue
        left -= len(solution_ids) + len(explanation_ids)
        table["row"].append(i)
        table["solution_tokens"].append(scorer.solution_token_texts(solution_ids))
        table["solution_log_prob"].append(scored.solution_logprobs[i].tolist() if scored.solution_logprobs else [])
        table["explanation_tokens"].append(scorer.explanation_token_texts(explanation_ids))
        table["explanation_kl"].append(_kl(scored, i) if compared else [])
    return table


def telling_rows(rollout: Rollout, rewards_B: list[float]) -> list[int]:
    """Row numbers: the best of each group, then the worst of each, then the second best, and so on inwards."""
    inwards, start = [], 0
    for group in rollout.groups:
        ranked = sorted(range(start, start + len(group.completions)), key=lambda i: -rewards_B[i])
        inwards.append([ranked[-1 - k // 2 if k % 2 else k // 2] for k in range(len(ranked))])
        start += len(group.completions)
    return [row for tier in zip_longest(*inwards) for row in tier if row is not None]


def _kl(scored: ScoredRollout, row: int) -> list[float]:
    student, teacher = scored.student_explanation_logprobs, scored.teacher_explanation_logprobs
    assert student is not None and teacher is not None
    return (teacher[row].float() - student[row].float()).tolist()
