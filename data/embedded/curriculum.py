"""The curriculum of the embedded task, from which a new masked-diffusion model learns to add."""

import random

from transformers import PreTrainedTokenizerBase

from data.embedded.task import generate_facts
from data.formats import PromptFormat, encode
from data.layouts import Row
from data.samples import Sample, filled, response_sample
from schemas.llada import MaskedDiffusionRunConfig

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
    facts = [filled(config, tokenizer, encode(tokenizer, p), encode(tokenizer, r)) for p, r in generate_facts()]

    def single_step() -> Sample:
        row = rng.choice(rows)
        trace = row["reasoning_trace"]
        cut = rng.choice([i for i, character in enumerate(trace) if character == "="]) + 1
        head = prompt_format.student_head_text(tokenizer, row["question"])
        given, result = encode(tokenizer, head + trace[:cut]), encode(tokenizer, trace[cut])
        tail = prompt_format.student_tail(tokenizer, row["question"], row["solution"])
        num_after = len(encode(tokenizer, trace[cut + 1 :] + tail.text))
        masks = [tokenizer.mask_token_id] * num_after  # as when blocks are sampled from left to right
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
