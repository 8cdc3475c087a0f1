"""Rows of supervised fine-tuning: token ids of a prompt and of the completion that is learned.

Prompt and completion are tokenised apart, as they are in reinforcement learning and in scoring: where a token of the
prompt ends, the model goes on by itself. So what is learned is known without looking for it in a text, whatever an
explanation begins with.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.log import log
from data.dataset import report_bad_rows, split_rows
from data.formats import PromptFormat
from data.layouts import Row
from schemas.sft import SupervisedRunConfig

_TOKENISED_AT_ONCE = 256


def prepare_supervised(
    config: SupervisedRunConfig, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows: `input_ids` (prompt and completion) and `prompt_len`, of which nothing is learned.

    Rows without a trace are unusable. Rows with a prompt above `max_prompt_length`, or above `max_length` in all, are
    left out, counted and reported; none is cut. No held-out question occurs in training. Of the others the first
    `num_train_rows` stay.

    Raises:
        UserError: an unreadable dataset, too many unusable rows, or no row that fits.
    """
    train_rows, eval_rows = split_rows(
        config, prompt_format.tags, seed, lambda rows, name: _fit(rows, config, tokenizer, prompt_format, name)
    )
    return _as_dataset(train_rows[: config.num_train_rows]), _as_dataset(eval_rows) if eval_rows else None


def texts_of_row(
    config: SupervisedRunConfig, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, row: Row
) -> tuple[str, list[str]]:
    """The prompt, and the pieces of the completion, each tokenised alone.

    The student's opened thought is a piece of its own: a student that is asked with it already written, as the reward
    asks, reads the same tokens.
    """
    question, solution, trace = row["question"], row["solution"], row["reasoning_trace"]
    if config.learns_explanations:
        prompt = prompt_format.teacher_prompt_text(tokenizer, question, solution)
        return prompt, [prompt_format.teacher_completion_text(tokenizer, question, trace)]
    opened, thought = prompt_format.tags.thought.opening + prompt_format.opening_padding, trace
    prompt = prompt_format.student_head_text(tokenizer, question).removesuffix(opened)
    tail = prompt_format.student_tail(tokenizer, question, solution)
    return prompt, [opened, thought.removeprefix(prompt_format.opening_padding) + tail.text]


def _fit(
    rows: list[Row],
    config: SupervisedRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    name: str,
) -> list[Row]:
    usable = [row for row in rows if row.get("reasoning_trace")]
    problems = [f"the question {row['question'][:80]!r} has no trace" for row in rows if not row.get("reasoning_trace")]
    report_bad_rows(name, problems, len(rows), config.max_bad_rows_frac, expected="a reasoning_trace in each row")
    texts = [texts_of_row(config, tokenizer, prompt_format, row) for row in usable]
    prompts = _encode_all(tokenizer, [prompt for prompt, _ in texts])
    pieces = iter(_encode_all(tokenizer, [piece for _, pieces in texts for piece in pieces]))
    fitting: list[Row] = []
    for row, prompt_ids, (_, own_pieces) in zip(usable, prompts, texts, strict=True):
        input_ids = np.concatenate([prompt_ids, *(next(pieces) for _ in own_pieces)])
        if len(prompt_ids) <= config.max_prompt_length and len(input_ids) <= config.sft.max_length:
            fitting.append({"question": row["question"], "input_ids": input_ids, "prompt_len": len(prompt_ids)})
    if not fitting:
        raise UserError(
            f"no row of `{name}` fits max_length={config.sft.max_length} and "
            f"max_prompt_length={config.max_prompt_length}",
            expected="prompts, and prompts with what is learned, within these numbers of tokens",
            remedy="raise them, or shorten the texts",
        )
    if len(fitting) < len(usable):
        log.warning(
            "%d of %d rows of `%s` have prompts above %d tokens (max_prompt_length), or are above %d in all "
            "(max_length), and are left out",
            *(len(usable) - len(fitting), len(rows), name, config.max_prompt_length, config.sft.max_length),
        )
    return fitting


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """As `data.formats.encode`, many at once and in arrays: lists of ids would take ten times their memory."""
    found: list[np.ndarray] = []
    for start in range(0, len(texts), _TOKENISED_AT_ONCE):
        part = list(texts[start : start + _TOKENISED_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, truncation=False, verbose=False)
        found += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    return found


def _as_dataset(rows: Iterable[Row]) -> Dataset:
    rows = list(rows)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in ("input_ids", "prompt_len")})
