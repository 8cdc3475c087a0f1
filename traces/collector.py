"""TraceCollector: explanations of some questions from the teacher, scored, ranked, and chosen from."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from core.types import Phase
from data.embedded.task import classify_explanation
from generation.policy import PolicySampler
from models.host import ModelHost
from rollout.scoring import RolloutScorer
from rollout.tables import term_columns
from rollout.types import Group, Rollout
from schemas.data import ARITHMETIC
from schemas.traces import TracesRunConfig
from scoring.written import WrittenExplanationError, as_completion
from traces.candidates import Row, by_question, choose, is_usable, rank
from traces.chunks import trace_seeds


class TraceCollector:
    """Collects the traces of a run from its models.

    Args:
        host: owns teacher and student.
        sampler: samples the teacher.
        scorer: the RLT reward of sampled token ids.
    """

    def __init__(
        self,
        config: TracesRunConfig,
        *,
        host: ModelHost,
        sampler: PolicySampler,
        scorer: RolloutScorer,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._config, self._host, self._sampler, self._scorer = config, host, sampler, scorer
        self._special_tokens = tokenizer.all_special_tokens
        self._classify = classify_explanation if config.dataset_id_or_path == ARITHMETIC else None

    def __call__(self, rows: Sequence[int], groups: Sequence[Group]) -> list[Row]:
        """A table row for each of `num_samples` explanations of the questions, in order; `rows` number the questions.

        Prompts of like length are sampled together.
        """
        num_samples, seed = self._config.num_samples, self._config.arguments.seed
        order = sorted(range(len(rows)), key=lambda i: len(groups[i].prompt_ids))
        seeds = trace_seeds(seed, [rows[i] for i in order], num_samples)
        rollout = self._sampler.sample([groups[i] for i in order], num_samples, seeds, version=0)
        groups_in_order = sorted(zip(order, rollout.groups, strict=True), key=lambda pair: pair[0])
        table = self._scored(rows, Rollout(groups=tuple(group for _, group in groups_in_order)))
        for candidates in by_question(table):
            rank(candidates)
            usable = [
                is_usable(row, max_tokens=self._config.max_trace_tokens, malformed=self._config.choose_malformed)
                for row in candidates
            ]
            choose(candidates, self._config.choose, usable=usable, seed=seed)
        return table

    def _scored(self, rows: Sequence[int], rollout: Rollout) -> list[Row]:
        with self._host.phase(Phase.SCORE):
            scored = self._scorer(rollout, every_term=True)
        terms = {"reward": scored.breakdown.reward.tolist(), **term_columns(scored)}
        table = []
        for i, (row, found) in enumerate(zip(rollout.rows, scored.rows, strict=True)):
            question, solution = row.group.question, row.group.solution
            entry: dict[str, Any] = {
                "row": rows[i // self._config.num_samples],
                "sample": i % self._config.num_samples,
                "question": question,
                "solution": solution,
                "reasoning_trace": found.explanation,
                "problem": self._problem(found.explanation, solution, is_closed=found.matched),
                "num_tokens": found.explanation_slice.stop,
                "finish_reason": row.completion.finish_reason,
            }
            if self._classify is not None:
                entry["kind"] = self._classify(question, solution, found.explanation)
            table.append(entry | {name: values[i] for name, values in terms.items()})
        return table

    def _problem(self, explanation: str, solution: str, *, is_closed: bool) -> str | None:
        """Why an explanation is malformed; None: it is not."""
        if not is_closed:
            return "never closed"
        if not explanation.strip():
            return "empty"
        if "\ufffd" in explanation:
            return "bytes that are no text"
        try:
            as_completion(explanation, solution, self._scorer.format, self._special_tokens)
        except WrittenExplanationError as error:
            return str(error)
        return None
