"""Samples for masked diffusion: token ids of a prompt and a response (sft), or of a piece of text (pretrain)."""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.log import log
from data.dataset import Row, report_bad_rows, split_rows, warn_that_nothing_is_evaluated
from data.embedded.curriculum import arithmetic_curriculum
from data.formats import PromptFormat, encode
from data.layouts import check_columns, check_fields
from data.samples import Sample, response_sample
from data.sources import read_rows
from schemas.data import ARITHMETIC
from schemas.llada import MaskedDiffusionRunConfig


def prepare_samples(
    config: MaskedDiffusionRunConfig, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Training samples and held-out ones.

    sft: the prompt is the student's chat with the question, the response what it should write (trace and tagged
    solution), filled with end-of-text tokens to a multiple of `response_multiple`. pretrain: the field `text` of each
    row and an end-of-text token, cut into pieces of `max_response_length`; held-out pieces are of other documents.

    Raises:
        UserError: an unreadable dataset, too many unusable rows, or no sample that fits.
    """
    if config.objective == "pretrain":
        return _prepare_texts(config, tokenizer, seed)
    num_too_long = 0

    def fit(rows: list[Row], name: str) -> list[Row]:
        nonlocal num_too_long
        fitting = [row for row in rows if _fits(config, response_sample(config, tokenizer, prompt_format, row))]
        num_too_long += len(rows) - len(fitting)
        if not fitting:
            raise _nothing_fits(config, name)
        return fitting

    train_rows, eval_rows = split_rows(config, prompt_format.tags, seed, fit)
    if num_too_long:
        log.warning(
            "%d rows have prompts above max_prompt_length=%d or responses above max_response_length=%d: left out",
            *(num_too_long, config.max_prompt_length, config.max_response_length),
        )
    held_out = [response_sample(config, tokenizer, prompt_format, row) for row in eval_rows]
    if config.dataset_id_or_path == ARITHMETIC:
        return arithmetic_curriculum(config, tokenizer, prompt_format, train_rows, seed), held_out
    return [response_sample(config, tokenizer, prompt_format, row) for row in train_rows], held_out


def _fits(config: MaskedDiffusionRunConfig, sample: Sample) -> bool:
    response_len = len(sample.token_ids) - sample.prompt_len
    return sample.prompt_len <= config.max_prompt_length and response_len <= config.max_response_length


def _nothing_fits(config: MaskedDiffusionRunConfig, name: str) -> UserError:
    return UserError(
        f"no row of `{name}` fits max_prompt_length={config.max_prompt_length} and "
        f"max_response_length={config.max_response_length}",
        expected="prompts and responses within these numbers of tokens",
        remedy="raise them, or shorten the texts",
    )


def _prepare_texts(
    config: MaskedDiffusionRunConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Sample], list[Sample]]:
    texts = _texts(config, config.dataset_id_or_path)
    random.Random(seed).shuffle(texts)
    if config.eval_dataset_id_or_path is not None:
        held_out_texts, num_held_out_texts = _texts(config, config.eval_dataset_id_or_path), 0
    else:
        num_held_out_texts = min(config.num_eval_prompts, len(texts) // 5)
        held_out_texts = texts[:num_held_out_texts]
        if config.num_eval_prompts and not held_out_texts:
            warn_that_nothing_is_evaluated(len(texts), "text")
    train = _pieces(config, tokenizer, texts[num_held_out_texts:])
    return train, _pieces(config, tokenizer, held_out_texts)[: config.num_eval_prompts]


def _texts(config: MaskedDiffusionRunConfig, name: str) -> list[str]:
    check_fields(config.column_names, ("text",))
    column = config.column_names.get("text", "text")
    texts, problems = [], []
    columns: dict[str, None] = {}
    for row in read_rows(name, config.dataset_config_name, config.dataset_split):
        values = row.values if isinstance(row.values, dict) else {}
        columns |= dict.fromkeys(values)
        text = values.get(column)
        if isinstance(text, str) and text.strip():
            texts.append(text)
        else:
            problems.append(f"{row.place}: {row.problem or f'has no field `{column}` with a text'}")
    check_columns(config.column_names, columns, name)
    num_rows = len(texts) + len(problems)
    report_bad_rows(name, problems, num_rows, config.max_bad_rows_frac, expected=f"texts in the field `{column}`")
    return texts


def _pieces(config: MaskedDiffusionRunConfig, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Sample]:
    length = config.max_response_length
    ids = (encode(tokenizer, text) + [tokenizer.eos_token_id] for text in texts)
    return [Sample(doc[start : start + length], 0) for doc in ids for start in range(0, len(doc), length)]


def pack(samples: list[Sample], row_length: int) -> Iterator[list[Sample]]:
    """Rows of consecutive samples that hold at most `row_length` tokens; a row is closed when the next does not fit."""
    row: list[Sample] = []
    num_tokens = 0
    for sample in samples:
        if row and num_tokens + len(sample.token_ids) > row_length:
            yield row
            row, num_tokens = [], 0
        row.append(sample)
        num_tokens += len(sample.token_ids)
    if row:
        yield row
