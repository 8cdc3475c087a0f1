"""The embedded weak student: the model that a distillation starts from, made on this machine in seconds.

It has the architecture and the tokenizer of the embedded model (`data.embedded.model`) and weights of its own. It
knows the sums of two digits, the format of an answer, and how sums of two or three digits are worked out; those of five
digits, which are the task, it gets right by chance. What it solves after a distillation it was taught by the traces.
"""

import random
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from core.log import log
from data.embedded.model import Row, ensure_folder, model_config, sampled_ids, student_example
from data.embedded.task import generate_facts, generate_rows, generate_short_rows
from data.embedded.tokenizer import EMBEDDED_FORMAT, build_tokenizer
from data.embedded.training import Example, optimize

STUDENT_FOLDER = "arithmetic-student-v2"
"""Folder name in the cache, followed by the seed. The number changes with anything that changes the weights."""
MAX_WEAK_ACCURACY = 0.2
"""Share of held-out sums that the weak student may solve, sampled at temperature 1."""

_NUM_FACTS_STEPS, _NUM_SHORT_STEPS = 60, 120
_NUM_TRAIN_ROWS, _NUM_GATE_ROWS = 4_000, 256
_BATCH_SIZE = 32
_MAX_NEW_TOKENS = 80


def ensure_weak_student(seed: int, cache_dir: Path | None = None) -> Path:
    """The folder with the weak student of a seed, made where it is missing; it lies where the embedded model does."""
    return ensure_folder(f"{STUDENT_FOLDER}-{seed}", partial(build_weak_student, seed=seed), cache_dir)


def build_weak_student(folder: Path, seed: int) -> None:
    """Train the weak student of a seed and write it to `folder`. Leaves torch's random state as it was.

    Raises:
        RuntimeError: it solves more than `MAX_WEAK_ACCURACY`, so that a distillation would show nothing.
    """
    tokenizer = build_tokenizer()
    rng, rows = random.Random(f"student {seed}"), generate_short_rows(_NUM_TRAIN_ROWS, seed)

    def short_sums() -> list[Example]:
        return [student_example(tokenizer, row) for row in rng.sample(rows, _BATCH_SIZE)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config(tokenizer)).train()
        for num_steps, draws in (
            (_NUM_FACTS_STEPS, (generate_facts,)),
            (_NUM_SHORT_STEPS, (short_sums, generate_facts)),
        ):
            for _ in optimize(model, tokenizer, num_steps, draws):
                pass
        model.bfloat16().eval()
        accuracy = sampled_accuracy(model, tokenizer, generate_rows(_NUM_GATE_ROWS, seed, "eval"))
    log.info("Embedded weak student of seed %d: %.2f of held-out sums solved", seed, accuracy)
    if accuracy >= MAX_WEAK_ACCURACY:
        raise RuntimeError(
            f"the weak student of seed {seed} solves {accuracy:.2f} of held-out sums (allowed: {MAX_WEAK_ACCURACY})"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Share of `rows` that the student solves by itself, thought and answer sampled at temperature 1."""
    prompts = [EMBEDDED_FORMAT.student_head_text(tokenizer, row["question"]) for row in rows]
    answers = tokenizer.batch_decode(sampled_ids(model, tokenizer, prompts, _MAX_NEW_TOKENS))
    wanted = [EMBEDDED_FORMAT.tags.solution.wrap(row["solution"]) for row in rows]
    return sum(text in answer for text, answer in zip(wanted, answers, strict=True)) / len(rows)
