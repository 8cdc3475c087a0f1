"""Questions of an evaluation: from any source that is read, drawn by the seed, with choices where they have some."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.log import log
from data.dataset import draw_questions, load_rows
from data.formats import PromptFormat, encode
from data.layouts import BadRowError, Row, RowParser
from data.sources import RawRow
from schemas.evaluate import EvaluateRunConfig, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    """As it is asked, prefix and choices included."""
    solution: str


def load_questions(config: EvaluateRunConfig) -> list[Question]:
    """Distinct questions, at most `num_eval_prompts` of them, the same and in the same order for each seed.

    Raises:
        UserError: the dataset cannot be read, or too many of its rows.
    """
    seed = config.sampling.seed

    def read(parser: RowParser, raw: RawRow) -> Row:
        row = parser.parse(raw)
        return with_choices(row, raw.values, config.wrong_answer_columns, seed) if config.wrong_answer_columns else row

    tags = PromptFormat.from_config(config).tags
    rows = load_rows(config, config.dataset_id_or_path, tags, seed, is_eval=True, read=read)
    drawn = draw_questions(rows, config.num_eval_prompts, seed)
    log.info("%d of %d questions of `%s`", len(drawn), len(rows), config.dataset_id_or_path)
    return [Question(config.question_prefix + row["question"], row["solution"]) for row in drawn]


def with_choices(row: Row, values: dict[str, Any], wrong_answer_columns: Sequence[str], seed: int) -> Row:
    """The question with all answers in lettered lines, in an order of its own, and the right letter as its solution."""
    wrong = [values.get(column) for column in wrong_answer_columns]
    if missing := [c for c, text in zip(wrong_answer_columns, wrong, strict=True) if not str(text or "").strip()]:
        raise BadRowError(f"has no wrong answer in {', '.join(missing)}")
    choices = [row["solution"].strip(), *(str(text).strip() for text in wrong)]
    random.Random(f"{seed} {row['question']}").shuffle(choices)
    lines = "\n".join(f"{letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    letter = ascii_uppercase[choices.index(row["solution"].strip())]
    return {"question": f"{row['question'].strip()}\n\n{lines}", "solution": letter}


def encoded_prompts(
    questions: Sequence[Question], prompt: Prompt, config: EvaluateRunConfig, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each question as a model is asked it, up to where its answer begins.

    Raises:
        UserError: a prompt is longer than `max_prompt_length` (left out, a question would change the figures), or the
            tokenizer has no chat template.
    """
    texts = [_prompt_text(question.text, prompt, config, tokenizer) for question in questions]
    prompts = [encode(tokenizer, text) for text in texts]
    longest = max(map(len, prompts))
    if longest > config.max_prompt_length:
        raise UserError(
            f"the longest question takes {longest} tokens with the tokenizer of {tokenizer.name_or_path}, and "
            f"max_prompt_length is {config.max_prompt_length}",
            expected="room for every question: each model answers the same ones",
            remedy=f"max_prompt_length={longest}",
        )
    return prompts


def _prompt_text(question: str, prompt: Prompt, config: EvaluateRunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    if prompt == "student":
        return PromptFormat.from_config(config).student_head_text(tokenizer, question)
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer `{tokenizer.name_or_path}` has no chat template",
            expected="a chat template, since `prompt` is chat",
            remedy="use an instruct model, or prompt=student for one that this project trained",
        )
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
    )
    return str(text)
