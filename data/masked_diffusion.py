"""Samples for masked diffusion: token ids of a prompt and a response (sft), or of a piece of text (pretrain)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.log import log
from data.arithmetic import generate_facts
from data.dataset import Row, report_bad_rows, split_rows, warn_that_nothing_is_evaluated
from data.formats import PromptFormat, encode
from data.layouts import check_columns, check_fields
from data.sources import read_rows
from schemas.data import ARITHMETIC
from schemas.llada import MaskedDiffusionRunConfig


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of one sample; those between the first `prompt_len` and the last `num_after` may be masked."""

    token_ids: list[int]
    prompt_len: int
    solution: str = ""
    num_after: int = 0
    """Tokens behind the learned ones that are given as they are."""

    @property
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.prompt_len]


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


# Draws of a stage, each about one optimizer step; facts, single steps and continuations in a draw.
_CURRICULUM = ((200, 480, 0, 0), (250, 40, 60, 0), (1300, 32, 16, 32))


def arithmetic_curriculum(
    config: MaskedDiffusionRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    rows: list[Row],
    seed: int,
) -> list[Sample]:
    """The embedded task in the order in which a new model can learn it; use it with packing, in sequence.

    First sums of two digits as plain text, then one result of a worked sum in the student's chat with masks behind it,
    as sampling meets it, then everything that is left of the sum, from any step on. Left to itself the third kind
    teaches copying and never adding: each digit occurs twice, so that most masked ones can be read off their copy.
    """
    rng = random.Random(seed)
    facts = [_filled(config, tokenizer, encode(tokenizer, p), encode(tokenizer, r)) for p, r in generate_facts()]

    def single_step() -> Sample:
        row = rng.choice(rows)
        trace = row["reasoning_trace"]
        cut = rng.choice([i for i, character in enumerate(trace) if character == "="]) + 1
        head = prompt_format.student_head_text(tokenizer, row["question"])
        given, result = encode(tokenizer, head + trace[:cut]), encode(tokenizer, trace[cut])
        tail = prompt_format.student_tail(tokenizer, row["question"], row["solution"])
        num_after = len(encode(tokenizer, trace[cut + 1 :] + tail.text))
        masks = [tokenizer.mask_token_id] * num_after  # as sampling from the left meets it
        return Sample(given + result + masks, len(given), num_after=num_after)

    def continuation() -> Sample:
        row = rng.choice(rows)
        ends = [i + 1 for i, character in enumerate(row["reasoning_trace"]) if character == ";"]
        return response_sample(config, tokenizer, prompt_format, row, num_given=rng.choice([0] * len(ends) + ends))

    samples = []
    for num_draws, num_facts, num_steps, num_continuations in _CURRICULUM:
        for _ in range(num_draws):
            drawn = rng.choices(facts, k=num_facts)
            drawn += [single_step() for _ in range(num_steps)]
            drawn += [continuation() for _ in range(num_continuations)]
            rng.shuffle(drawn)
            samples += drawn
    return samples


def response_sample(
    config: MaskedDiffusionRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    row: Row,
    num_given: int = 0,
) -> Sample:
    """A question's chat and what the student should write; the first `num_given` characters of its trace are given."""
    tail = prompt_format.student_tail(tokenizer, row["question"], row["solution"])
    trace = row.get("reasoning_trace") or ""
    head = prompt_format.student_head_text(tokenizer, row["question"])
    response_ids = encode(tokenizer, trace[num_given:] + tail.text)
    return _filled(config, tokenizer, encode(tokenizer, head + trace[:num_given]), response_ids, row["solution"])


def _filled(
    config: MaskedDiffusionRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    response_ids: list[int],
    solution: str = "",
) -> Sample:
    num_filler = -len(response_ids) % config.response_multiple
    response_ids = response_ids + [tokenizer.eos_token_id] * num_filler
    return Sample(prompt_ids + response_ids, len(prompt_ids), solution)


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
