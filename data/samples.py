"""One sample of masked diffusion: tokens of a prompt and a response, or of a piece of text."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data.formats import PromptFormat, encode
from data.layouts import Row
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
    return filled(config, tokenizer, encode(tokenizer, head + trace[:num_given]), response_ids, row["solution"])


def filled(
    config: MaskedDiffusionRunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    response_ids: list[int],
    solution: str = "",
) -> Sample:
    """The response filled with end-of-text tokens to a multiple of `response_multiple`."""
    num_filler = -len(response_ids) % config.response_multiple
    response_ids = response_ids + [tokenizer.eos_token_id] * num_filler
    return Sample(prompt_ids + response_ids, len(prompt_ids), solution)
