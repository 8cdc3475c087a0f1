"""Tables of completions, and the table and metrics of an evaluation.

Letters: B completions.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.tags import TagStyle
from rewards.format import is_well_formed
from rollout.scoring import ScoredRollout
from rollout.types import Completion, Rollout

Classifier = Callable[[str, str, str], str]
"""(question, solution, explanation) -> what kind of explanation it is."""


def completion_texts(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> list[str]:
    return tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def format_rate(texts: Sequence[str], tags: TagStyle) -> float:
    """Share of completions that keep to the format."""
    return mean(is_well_formed(text, tags) for text in texts)


def explanation_columns(
    rollout: Rollout, scored: ScoredRollout, classify: Classifier | None = None
) -> dict[str, list[str]]:
    """[B] question, solution and explanation, and its kind where the task can tell."""
    groups = [row.group for row in rollout.rows]
    columns = {
        "question": [group.question for group in groups],
        "solution": [group.solution for group in groups],
        "explanation": [row.explanation for row in scored.rows],
    }
    if classify is not None:
        columns["kind"] = list(map(classify, *columns.values()))
    return columns


def term_columns(scored: ScoredRollout) -> dict[str, list[float]]:
    """[B] every term of the reward."""
    return {name: values_B.tolist() for name, values_B in scored.breakdown.terms.items()}


def evaluation_table(
    rollout: Rollout, scored: ScoredRollout, texts: Sequence[str], classify: Classifier | None = None
) -> dict[str, list[Any]]:
    """A row per held-out question: what was sampled, its log-prob, and every term of the reward."""
    completions = rollout.completions
    return {
        "prompt": [row.group.columns.get("prompt") for row in rollout.rows],
        "completion": list(texts),
        **explanation_columns(rollout, scored, classify),
        "num_tokens": [len(c.token_ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
        "sampler_log_prob": [sum(c.logprobs) if c.logprobs is not None else None for c in completions],
        "reward": scored.breakdown.reward.tolist(),
        **term_columns(scored),
    }


def evaluation_metrics(scored: ScoredRollout, table: dict[str, list[Any]], tags: TagStyle) -> dict[str, float]:
    """Means over the held-out questions.

    `solution_log_prob` is the student's mean log-prob per solution token given the explanation (nats, at the reward's
    student temperature); `share/KIND` the share of explanations of a kind.
    """
    means, kinds = scored.breakdown.means(), table.get("kind", [])
    return {
        "solution_log_prob": means["unprocessed_answer_log_prob_mean"],
        "reward": means["reward"],
        "format_rate": format_rate(table["completion"], tags),
        "explanation_tokens": mean(row.explanation_slice.stop for row in scored.rows),
        **{f"share/{kind}": kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))},
    }
