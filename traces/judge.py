"""The judge: a student that has no part in the reward scores every candidate of a collection."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pyarrow
from transformers import PreTrainedTokenizerBase

from core.log import log
from core.types import Phase, Role
from data.formats import PromptFormat, encode
from models.host import ModelHost
from models.load import load_tokenizer
from rollout.spans import RowBuilder
from runs.summary import Meter
from schemas.traces import TracesRunConfig
from scoring.with_models import written_rollout
from traces.candidates import Row
from traces.summary import JUDGED


class Judge:
    """Mean log-prob per solution token of written explanations under `judge_model`; owns that model.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, config: TracesRunConfig, tokenizer: PreTrainedTokenizerBase, max_score_tokens: int) -> None:
        assert config.judge_model is not None
        log.info("the judge scores every explanation: %s", config.judge_model)
        self._format, self._tokenizer = PromptFormat.from_config(config), tokenizer
        self._temperature = config.unbias_student_log_probs_temp
        own = load_tokenizer(config.judge_model, config.model_args)
        shares_tokens = own.get_vocab() == tokenizer.get_vocab()
        self._builder = RowBuilder(tokenizer, self._format, None if shares_tokens else own)
        self._host = ModelHost(
            replace(config, student_model=config.judge_model),
            roles=(Role.STUDENT,),
            max_score_tokens=max_score_tokens,
            max_oom_retries=config.max_oom_retries,
        )

    @property
    def meter(self) -> Meter:
        return self._host.meter

    def __call__(self, table: Sequence[Row]) -> list[float]:
        closing_tag = self._format.tags.explanation.closing
        rollout = written_rollout(
            self._tokenizer,
            self._format,
            [row["question"] for row in table],
            [row["solution"] for row in table],
            [encode(self._tokenizer, row["reasoning_trace"] + closing_tag) for row in table],
        )
        rows = [self._builder.build(row).student for row in rollout.rows]
        with self._host.phase(Phase.SCORE):
            rows = [replace(row, spans=row.spans[:1]) for row in rows]
            return [spans[0].mean().item() for spans in self._host.score(Role.STUDENT, rows, self._temperature)]

    def close(self) -> None:
        self._host.close()


def with_judgement(table: pyarrow.Table, judge: Judge, num_at_once: int) -> pyarrow.Table:
    """The table with the judge's column, `JUDGED`; the judge is closed."""
    rows: list[Row] = table.select(["question", "solution", "reasoning_trace"]).to_pylist()
    with closing(judge):
        scored = [
            value for start in range(0, len(rows), num_at_once) for value in judge(rows[start : start + num_at_once])
        ]
    return table.append_column(JUDGED, pyarrow.array(scored, pyarrow.float64()))
