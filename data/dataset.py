"""Dataset rows from any source, checked one by one and turned into prompts."""

import random
from collections.abc import Callable, Iterator

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.log import log
from data.embedded.task import generate_rows
from data.formats import PromptFormat, encode_all, encode_student_tails
from data.layouts import QUESTION_COLUMNS, SOLUTION_COLUMNS, BadRowError, Row, RowParser, check_fields
from data.sources import RawRow, read_rows
from data.tags import TagStyle
from schemas.data import ARITHMETIC, DataConfig

NUM_ARITHMETIC_ROWS = 4096
MAX_HELD_OUT_FRAC = 0.2
_NUM_PROBLEMS_SHOWN = 10
_ROWS_AT_ONCE = 1000
"""Tokenised in one call: on all cores, and of which the offsets of every token are in memory."""


def prepare_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows: `prompt` (the teacher's, as text), `prompt_ids`, `question`, `solution`.


    No held-out question occurs in training. Without `eval_dataset_id_or_path` they are taken off the training rows, at
    most a fifth of the questions. The second dataset is None where `num_eval_prompts` is 0 or nothing can be spared.

    Raises:
        UserError: an unreadable dataset, too many unusable rows, or no row left.
    """
    train_rows, eval_rows = split_rows(
        config, prompt_format.tags, seed, lambda rows, name: _fit(rows, config, tokenizer, prompt_format, name)
    )
    return _as_dataset(train_rows), _as_dataset(eval_rows) if eval_rows else None


def split_rows(
    config: DataConfig, tags: TagStyle, seed: int, fit: Callable[[list[Row], str], list[Row]]
) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows without a question in common; `fit(rows, dataset name)` prepares them.

    Raises:
        UserError: as `prepare_datasets`.
    """
    rows = fit(load_rows(config, config.dataset_id_or_path, tags, seed), config.dataset_id_or_path)
    eval_rows: list[Row] = []
    if config.num_eval_prompts and config.eval_dataset_id_or_path is not None:
        eval_rows = load_rows(config, config.eval_dataset_id_or_path, tags, seed, is_eval=True)
        eval_rows = draw_questions(fit(eval_rows, config.eval_dataset_id_or_path), config.num_eval_prompts, seed)
    elif config.num_eval_prompts:
        eval_rows = _hold_out(rows, config.num_eval_prompts, seed)
    held_out = {row["question"] for row in eval_rows}
    train_rows = [row for row in rows if row["question"] not in held_out]
    if not train_rows:
        raise UserError(
            f"every question of `{config.dataset_id_or_path}` is also held out for evaluation",
            expected="questions to train on",
            remedy="set num_eval_prompts=0 or another eval_dataset_id_or_path",
        )
    log.info("%d rows to train on, %d held out", len(train_rows), len(eval_rows))
    return train_rows, eval_rows


def _as_dataset(rows: list[Row]) -> Dataset:
    """A column for every field that occurs; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def load_rows(
    config: DataConfig,
    dataset_id_or_path: str,
    tags: TagStyle,
    seed: int,
    *,
    is_eval: bool = False,
    read: Callable[[RowParser, RawRow], Row] = RowParser.parse,
) -> list[Row]:
    """The usable rows of a dataset; the others are logged with their place and the reason.

    `read` makes a row of what lies there, or raises `BadRowError`.

    Raises:
        UserError: the dataset cannot be read, has no column of a name in `column_names`, or more than
            `max_bad_rows_frac` of its rows are unusable.
    """
    if dataset_id_or_path == ARITHMETIC:
        if is_eval:
            return generate_rows(max(config.num_eval_prompts, 1), seed, "eval")
        check_fields(config.column_names, ())
        return generate_rows(NUM_ARITHMETIC_ROWS, seed, "train")
    good: list[Row] = []
    problems: list[str] = []
    parser = RowParser(config.column_names, tags)
    for raw in read_rows(dataset_id_or_path, config.dataset_config_name, config.dataset_split):
        try:
            good.append(read(parser, raw))
        except BadRowError as error:
            problems.append(f"{raw.place}: {error}")
    parser.check_columns(dataset_id_or_path)
    report_bad_rows(dataset_id_or_path, problems, num_rows=len(good) + len(problems), limit=config.max_bad_rows_frac)
    for note, num_rows in parser.notes.items():
        log.info("%d of %d rows of `%s`: %s", num_rows, len(good) + len(problems), dataset_id_or_path, note)
    return good


_EXPECTED_ROW = f"chats, or the columns {' / '.join(QUESTION_COLUMNS)} and {' / '.join(SOLUTION_COLUMNS)}"


def report_bad_rows(name: str, problems: list[str], num_rows: int, limit: float, expected: str = _EXPECTED_ROW) -> None:
    """Log the rows that are left out, with place and reason.

    Raises:
        UserError: there are no rows, or more than the share `limit` of them is unusable.
    """
    shown = "\n".join(f"  {problem}" for problem in problems[:_NUM_PROBLEMS_SHOWN])
    more = f"\n  and {len(problems) - _NUM_PROBLEMS_SHOWN} more" if len(problems) > _NUM_PROBLEMS_SHOWN else ""
    if num_rows == 0:
        raise UserError(f"`{name}` has no rows", expected="at least one row", remedy="check the path and the split")
    if len(problems) > limit * num_rows or len(problems) == num_rows:
        raise UserError(
            f"{len(problems)} of {num_rows} rows of `{name}` cannot be used:\n{shown}{more}",
            expected=f"{expected}; at most {limit:.1%} of the rows unusable",
            remedy="mend these rows, name the columns (column_names), or raise max_bad_rows_frac to drop the rows",
        )
    if problems:
        log.warning("%d of %d rows of `%s` are left out:\n%s%s", len(problems), num_rows, name, shown, more)


def _fit(
    rows: list[Row],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    name: str,
) -> list[Row]:
    """Rows with their prompt; those with too long a prompt, or a solution without a token of its own, are left out."""
    fitting: list[Row] = []
    num_too_long = 0
    fused: list[str] = []
    for row, prompt, prompt_ids, has_solution in _encoded(rows, tokenizer, prompt_format):
        if not has_solution:
            fused.append(f"the solution {row['solution']!r} has no token of its own: its text fuses with the tags")
        elif len(prompt_ids) > config.max_prompt_length:
            num_too_long += 1
        else:
            fitting.append({"prompt": prompt, "prompt_ids": prompt_ids, **row})
    if fused:
        report_bad_rows(name, fused, len(rows), config.max_bad_rows_frac)
    if num_too_long:
        log.warning(
            "%d of %d rows of `%s` have prompts above %d tokens (max_prompt_length) and are left out",
            *(num_too_long, len(rows), name, config.max_prompt_length),
        )
    if not fitting:
        raise UserError(
            f"all {len(rows)} rows of `{name}` have prompts above max_prompt_length={config.max_prompt_length} tokens",
            expected="prompts (system prompt, question and solution) that fit",
            remedy="raise max_prompt_length",
        )
    return fitting


def _encoded(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> Iterator[tuple[Row, str, list[int], bool]]:
    """Each row, the teacher's prompt as text and ids, and whether a token of the student's text is the solution's."""
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        asked = [(row["question"], row["solution"]) for row in some]
        prompts = [prompt_format.teacher_prompt_text(tokenizer, *pair) for pair in asked]
        tails = [prompt_format.student_tail(tokenizer, *pair) for pair in asked]
        has_solution = [start < end for _, (start, end) in encode_student_tails(tokenizer, tails)]
        yield from zip(some, prompts, encode_all(tokenizer, prompts), has_solution, strict=True)


def _hold_out(rows: list[Row], num_wanted: int, seed: int) -> list[Row]:
    num_questions = len({row["question"] for row in rows})
    num_held_out = min(num_wanted, int(num_questions * MAX_HELD_OUT_FRAC))
    if num_held_out == 0:
        warn_that_nothing_is_evaluated(num_questions, "distinct question")
    elif num_held_out < num_wanted:
        log.warning(
            "%d of %d questions are held out instead of num_eval_prompts=%d: at most a fifth is taken off training",
            *(num_held_out, num_questions, num_wanted),
        )
    return draw_questions(rows, num_held_out, seed)


def warn_that_nothing_is_evaluated(num_found: int, noun: str) -> None:
    """Warn that a dataset is too small to hold anything out."""
    log.warning(
        "%d %s%s: at most a fifth is taken off training, so none is held out and nothing is evaluated",
        *(num_found, noun, "s" * (num_found != 1)),
    )


def draw_questions(rows: list[Row], num_questions: int, seed: int) -> list[Row]:
    """The first row of each of `num_questions` distinct questions, drawn by the seed."""
    first_row = {row["question"]: row for row in reversed(rows)}
    questions = sorted(first_row)
    drawn = random.Random(seed).sample(questions, min(num_questions, len(questions)))
    return [first_row[question] for question in drawn]
