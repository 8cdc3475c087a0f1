"""Scoring of written explanations: their RLT reward, with everything else taken from a run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from rich.progress import Progress

from core.errors import UserError
from core.log import can_animate, console, log
from core.types import Role
from data.formats import PromptFormat, encode, encode_student_tail
from data.layouts import BadRowError, RowParser
from data.sources import RawRow
from models.host import ModelHost
from models.load import load_tokenizers, quiet_libraries
from models.trained import TrainedRun, open_run
from rollout.scoring import RolloutScorer, check_scoring
from scoring.with_models import written_rollout
from scoring.written import WrittenExplanationError, as_completion

_NUM_PROBLEMS_SHOWN = 5


def score_texts(
    questions: Sequence[str],
    solutions: Sequence[str],
    explanations: Sequence[str],
    *,
    run: str | Path,
    close_explanations: bool = True,
) -> pd.DataFrame:
    """Score written explanations with the reward of a run: every term of every row.

    Tokenizer, student, format, coefficients and precision are those of `run`: the folder of a run (its trained teacher
    is in the KL term), or the name of a run configuration (whose teacher is the base). The models are loaded for this
    call; `TextScorer(run)` keeps them.

    An explanation is the text between the tags, or a completion that ends with the closing tag, or a whole turn
    (`scoring/written.py`). `close_explanations=False` takes a text without closing tag as one that was cut off.

    Returns:
        A row for each text, in order: `question`, `solution`, `explanation`, `problem`, `reward`, and the terms as
        `RewardBreakdown` names them. Where `problem` says why a row cannot be scored, its numbers are NaN.

    Raises:
        UserError: no row can be scored, the lists differ in length, or the run's models cannot be loaded.
        ConfigError: the run's configuration is not valid any more.
        NonFiniteError: a log-prob is not finite.
    """
    check_lengths(questions, solutions, explanations)
    with TextScorer(run) as scorer:
        return scorer.score(questions, solutions, explanations, close_explanations=close_explanations)


def check_lengths(questions: Sequence[str], solutions: Sequence[str], explanations: Sequence[str]) -> None:
    """Refuse columns that are not three lists of one length.

    Raises:
        UserError: a text in place of a list, no row, or lists of different lengths.
    """
    if any(isinstance(texts, str) for texts in (questions, solutions, explanations)):
        raise UserError("a text in place of a list", expected="three lists of texts", remedy="put it in a list: [text]")
    lengths = {len(questions), len(solutions), len(explanations)}
    if len(lengths) > 1 or not all(lengths):
        raise UserError(
            f"{len(questions)} questions, {len(solutions)} solutions and {len(explanations)} explanations",
            expected="three lists of one length, with at least one row",
            remedy="give one solution and one explanation for each question",
        )


class TextScorer:
    """Scores texts with a run's reward. It owns teacher and student; `close()` or a `with` block frees them."""

    def __init__(self, run: str | Path) -> None:
        """
        Raises:
            UserError, ConfigError: see `score_texts`.
        """
        self.run: TrainedRun = open_run(run)
        config = self.run.config
        self._format = PromptFormat.from_config(config)
        self._tokenizer, student_tokenizer = load_tokenizers(config)
        self._student_tokenizer = student_tokenizer if student_tokenizer is not None else self._tokenizer
        reward = replace(config, teacher_logprobs="forward")
        check_scoring(reward, config.grpo.temperature, shares_tokens=student_tokenizer is None)
        quiet_libraries()
        max_tokens, max_retries = config.grpo.per_device_train_batch_size * self.run.row_len, config.max_oom_retries
        roles = (Role.TEACHER, Role.STUDENT)
        self._host = ModelHost(config, roles=roles, max_score_tokens=max_tokens, max_oom_retries=max_retries)
        self._scorer = RolloutScorer(
            tokenizer=self._tokenizer,
            prompt_format=self._format,
            reward_config=reward,
            sampling_temperature=config.grpo.temperature,
            score=self._host.score,
            student_tokenizer=student_tokenizer,
        )

    def close(self) -> None:
        """Free the models; nothing can be scored afterwards."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(
        self,
        questions: Sequence[str],
        solutions: Sequence[str],
        explanations: Sequence[str],
        *,
        close_explanations: bool = True,
    ) -> pd.DataFrame:
        """As `score_texts`."""
        check_lengths(questions, solutions, explanations)
        triples = list(zip(questions, solutions, explanations, strict=True))
        rows = [RawRow(f"row {i}", {"question": q, "solution": s}) for i, (q, s, _) in enumerate(triples, start=1)]
        return pd.DataFrame(self.score_rows(rows, explanations, close_explanations=close_explanations))

    def score_rows(
        self, rows: Sequence[RawRow], explanations: Sequence[Any], *, close_explanations: bool = True
    ) -> list[dict[str, Any]]:
        """As `score`, of rows in any layout that a dataset of the run may have; None in place of NaN."""
        columns = {name for raw in rows if isinstance(raw.values, dict) for name in raw.values}
        names = {field: column for field, column in self.run.config.column_names.items() if column in columns}
        parser = RowParser(names, self._format.tags)
        table = [
            self._prepared(parser, raw, explanation, close=close_explanations)
            for raw, explanation in zip(rows, explanations, strict=True)
        ]
        for note, num_rows in parser.notes.items():
            log.info("%d of %d rows: %s", num_rows, len(rows), note)
        _report_problems([(raw.place, row["problem"]) for raw, row in zip(rows, table, strict=True)])
        good = [row for row in table if row["problem"] is None]
        chunk = self.run.config.train_batch_size
        with Progress(console=console, transient=True, disable=len(good) <= chunk or not can_animate()) as progress:
            task = progress.add_task("scoring", total=len(good))
            for start in range(0, len(good), chunk):
                self._score(good[start : start + chunk])
                progress.advance(task, chunk)
        shown = [name for name in good[0] if name != "completion_ids"]
        return [{name: row.get(name) for name in shown} for row in table]

    def _prepared(self, parser: RowParser, raw: RawRow, explanation: Any, *, close: bool) -> dict[str, Any]:
        """A row of the table, with its completion, or with the problem that it has."""
        values = raw.values if isinstance(raw.values, dict) else {}
        row: dict[str, Any] = {name: values.get(name) for name in ("question", "solution")}
        row |= {"explanation": explanation, "problem": None, "completion_ids": None}
        try:
            row |= {name: text for name, text in parser.parse(raw).items() if name in row}
            text = as_completion(
                explanation, row["solution"], self._format, self._tokenizer.all_special_tokens, close=close
            )
            row["completion_ids"] = encode(self._tokenizer, text)
            self._check_tokens(row)
        except (BadRowError, WrittenExplanationError) as error:
            row["problem"] = str(error)
        return row

    def _check_tokens(self, row: dict[str, Any]) -> None:
        tokenizer, question, solution = self._student_tokenizer, row["question"], row["solution"]
        _, (start, end) = encode_student_tail(tokenizer, self._format, question, solution)
        if start == end:
            raise BadRowError(f"the solution {solution!r} has no token of its own: its text fuses with the tags")
        prompt = self._format.teacher_prompt_text(self._tokenizer, question, solution)
        num_tokens = len(encode(self._tokenizer, prompt)) + len(row["completion_ids"])
        limit = getattr(self._host.teacher.config, "max_position_embeddings", None)
        if limit is not None and num_tokens > limit:
            raise BadRowError(f"prompt and explanation are {num_tokens} tokens, and the teacher reads {limit}")

    def _score(self, rows: list[dict[str, Any]]) -> None:
        """Add reward and terms to prepared rows."""
        columns = ([row[name] for row in rows] for name in ("question", "solution", "completion_ids"))
        rollout = written_rollout(self._tokenizer, self._format, *columns)
        breakdown = self._scorer(rollout, every_term=True).breakdown
        for name, values_B in {"reward": breakdown.reward, **breakdown.terms}.items():
            for row, value in zip(rows, values_B.tolist(), strict=True):
                row[name] = None if math.isnan(value) else value


def _report_problems(problems: Sequence[tuple[str, str | None]]) -> None:
    found = [f"  {place}: {problem}" for place, problem in problems if problem is not None]
    more = len(found) - _NUM_PROBLEMS_SHOWN
    shown = "\n".join(found[:_NUM_PROBLEMS_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
    if len(found) == len(problems):
        raise UserError(
            f"none of {len(found)} rows can be scored:\n{shown}",
            expected="a question, a solution and an explanation in each row, as texts in the run's format",
            remedy="mend the rows; scoring/written.py says what an explanation may look like",
        )
    if found:
        log.warning("%d of %d rows are not scored (their `problem` says why):\n%s", len(found), len(problems), shown)
