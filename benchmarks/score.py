"""Rewards of a rollout: CPU seconds of our scorer in each layout against one completion after the other, as published.

    python -m benchmarks.score [--size 0.1b | embedded] [--groups 4] [--repeats 3]

Random weights, float32. Groups of 16: questions of about 400 tokens, completions of median 150 with a long tail. The
plain side forwards student and teacher on each completion alone and takes the log-softmax of all logits (with and
without the published code's `gc.collect()` after each). Ours does the same work with `teacher_logprobs=forward`, and
only the student's with the sampler's log-probs, which is the default. Sides take turns in one process; printed are
ratios of CPU seconds, and of the multiply-adds that the plain side does to those that ours does.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.paired import paired_seconds
from core.log import configure_logging, console
from core.types import Role
from data.embedded.tokenizer import build_tokenizer
from data.formats import PromptFormat, encode
from rollout.batches import input_len, make_batch, row_batches
from rollout.logprobs import DEFAULT_MAX_BATCH_TOKENS, cpu_batch_tokens, score_spans
from rollout.packed_attention import Layout, pack_sequences
from rollout.scoring import RolloutScorer
from rollout.types import Completion, Group, Rollout, ScoringRow
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.tiny_run import write_random_model

SIZES = {"embedded": (64, 2), "0.1b": (768, 12)}
"""(hidden size, layers) of student and teacher."""
NUM_GENERATIONS, TEMPERATURE = 16, 1.0


def draw_rollout(num_groups: int, prompt_format: PromptFormat, seed: int = 0) -> Rollout:
    """Random letters: questions of about 320 tokens (400 with the prompt around), lognormal completions."""
    tokenizer, generator, groups = build_tokenizer(), np.random.default_rng(seed), []
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    for _ in range(num_groups):
        question = "".join(generator.choice(letters, int(generator.normal(320, 40)))).strip()
        prompt_ids = encode(tokenizer, prompt_format.teacher_prompt_text(tokenizer, question, "42"))
        lengths = np.clip(np.exp(generator.normal(np.log(150), 0.9, NUM_GENERATIONS)), 8, 1024).astype(int)
        texts = ["".join(generator.choice(letters, n)) + prompt_format.tags.explanation.closing for n in lengths]
        completions = [
            Completion(token_ids=ids, logprobs=[-3.0] * len(ids), finish_reason="stop")
            for ids in (encode(tokenizer, text) for text in texts)
        ]
        group = Group(question=question, solution="42", prompt_ids=prompt_ids)
        groups.append(replace(group, completions=tuple(completions)))
    return Rollout(groups=tuple(groups))


def plain_score(model: PreTrainedModel, rows: Sequence[ScoringRow], *, collect: bool) -> list[tuple[Tensor, ...]]:
    """Full logits of one row after the other."""
    scored = []
    for row in rows:
        with torch.no_grad():
            logits_TV = model(torch.tensor([row.token_ids])).logits[0].float()
        targets_T = torch.tensor(row.token_ids[1:])
        logprobs_T = logits_TV[:-1].log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
        scored.append(tuple(logprobs_T[start - 1 : end - 1] for start, end in row.spans))
        if collect:
            gc.collect()
    return scored


def multiply_adds(model: PreTrainedModel, rows: Sequence[ScoringRow], layout: Layout | None, max_tokens: int) -> float:
    """Of the forwards that score the rows in a layout; None: one row after the other, with all logits.

    Linears: weights x tokens. Attention: 2 x hidden size per pair of tokens that sees each other.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.get_decoder().layers.parameters())
    per_pair = 2 * config.hidden_size * config.num_hidden_layers
    if layout is None:
        return float(sum(n * (body + head) + n * (n + 1) / 2 * per_pair for n in (len(r.token_ids) for r in rows)))
    total = head * sum(end - start for row in rows for start, end in row.spans)
    for members in row_batches(rows, max_tokens, layout):
        batch = make_batch([rows[i] for i in members], layout)
        total += batch.num_tokens * body
        if layout == "padded":
            width = batch.inputs["input_ids"].shape[1]
            total += len(members) * width * (width + 1) / 2 * per_pair
            continue
        segments = batch.inputs["packed"]
        for own, prefix in zip(segments.lengths, segments.prefixes, strict=True):
            before = 0 if prefix is None else segments.lengths[prefix]
            total += (own * (own + 1) / 2 + own * before) * per_pair
    return float(total)


def padded_share(rows: Sequence[ScoringRow], layout: Layout, max_tokens: int) -> float:
    return max(0.0, 1 - sum(input_len(row) for row in rows) / computed_tokens(rows, layout, max_tokens))


def computed_tokens(rows: Sequence[ScoringRow], layout: Layout | None, max_tokens: int) -> int:
    """Tokens that a model's forwards compute in a layout, padding included; None: one row after the other."""
    if layout is None:
        return sum(len(row.token_ids) for row in rows)
    batches = [[rows[i] for i in members] for members in row_batches(rows, max_tokens, layout)]
    return sum(make_batch(batch, layout).num_tokens for batch in batches)


def forwards_per_token(rows: Sequence[ScoringRow], layout: Layout | None, max_tokens: int) -> float:
    """How often a model computes each token on average; a prompt that a group has in common is one text."""
    distinct = computed_tokens(rows, "shared_prefix", sum(len(row.token_ids) for row in rows))
    return computed_tokens(rows, layout, max_tokens) / distinct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--groups", type=int, default=4, help="questions, with 16 completions each")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_BATCH_TOKENS, help="of one forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="also with the published code's gc.collect() (slow)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[name for name in WAYS if not WAYS[name].collect])
    words = parser.parse_args()
    configure_logging("WARNING")
    hidden, num_layers = SIZES[words.size]
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder) / "model", hidden=hidden, num_layers=num_layers)
        models = {
            role: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for role in (Role.STUDENT, Role.TEACHER)
        }
    compare(models, words)


@dataclass(frozen=True)
class Way:
    """How a side of the comparison scores."""

    layout: Layout | None
    """None: one completion after the other, all logits."""
    teacher_logprobs: str = "forward"
    collect: bool = False

    @property
    def roles(self) -> list[Role]:
        return [Role.STUDENT] if self.teacher_logprobs == "sampler" else [Role.STUDENT, Role.TEACHER]


WAYS = {
    "plain": Way(None),
    "plain, collect": Way(None, collect=True),
    "padded": Way("padded"),
    "packed": Way("packed"),
    "shared prefix": Way("shared_prefix"),
    "shared prefix, sampler's log-probs": Way("shared_prefix", teacher_logprobs="sampler"),
}


def compare(models: dict[Role, PreTrainedModel], words: argparse.Namespace) -> None:
    config = load_run_config(compose_run_config("teacher_rlt_tiny", ["student_model=tiny"]))
    prompt_format, max_tokens = PromptFormat.from_config(config), words.max_tokens
    rollout = draw_rollout(words.groups, prompt_format)
    rows: dict[Role, list[ScoringRow]] = {}

    def side(way: Way) -> Callable[[], Any]:
        def scored(role: Role, role_rows: Sequence[ScoringRow], temperature: float) -> Any:
            rows[role], model = list(role_rows), models[role]
            pack_sequences(model, way.layout or "padded")
            if way.layout is None:
                return plain_score(model, role_rows, collect=way.collect)
            return score_spans(model, role_rows, max_batch_tokens=max_tokens)

        rewards = RolloutScorer(
            tokenizer=build_tokenizer(),
            prompt_format=prompt_format,
            reward_config=replace(config, teacher_logprobs=way.teacher_logprobs),
            sampling_temperature=TEMPERATURE,
            score=scored,
        )
        return lambda: rewards(rollout).breakdown.reward

    wanted = {"plain", *words.ways, *(name for name in WAYS if words.published and WAYS[name].collect)}
    sides = {name: side(way) for name, way in WAYS.items() if name in wanted}
    rewards: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[[], None]:
        return lambda: rewards.update({name: sides[name]()})

    # The first look at every side is its warm-up at the embedded size; at 0.1 billion parameters nothing needs one.
    seconds = paired_seconds({name: keeping(name) for name in sides}, words.repeats, warm_up=words.size == "embedded")
    for name in {"padded", "packed", "shared prefix"} & set(sides):
        torch.testing.assert_close(rewards[name], rewards["plain"], atol=1e-4, rtol=1e-4)
    of_plain = sum(multiply_adds(models[role], rows[role], None, max_tokens) for role in rows)
    num_tokens = sum(len(completion.token_ids) for completion in rollout.completions)
    console.print(f"{len(rollout.rows)} completions, {sum(len(r.token_ids) for r in rollout.rows)} tokens with prompts")
    table = Table(box=None, padding=(0, 1))
    for column in ("", "CPU s", "tokens/s", "plain / this", "multiply-adds", "padding", "forwards a token"):
        table.add_column(column, justify="right" if column else "left")
    for name, side_s in seconds.items():
        way = WAYS[name]
        at_once = max_tokens
        if way.layout is not None:
            at_once = max(cpu_batch_tokens(rows[role], max_tokens, way.layout) for role in way.roles)
        done = sum(multiply_adds(models[role], rows[role], way.layout, at_once) for role in way.roles)
        padding = max(padded_share(rows[role], way.layout, at_once) for role in way.roles) if way.layout else 0.0
        forwards = max(forwards_per_token(rows[role], way.layout, at_once) for role in way.roles)
        ratios = f"{seconds['plain'] / side_s:.2f}", f"{of_plain / done:.2f}"
        table.add_row(name, f"{side_s:.2f}", f"{num_tokens / side_s:.0f}", *ratios, f"{padding:.3f}", f"{forwards:.2f}")
    console.print(table)
    console.print("plain / this: in seconds; multiply-adds: the same ratio of the work that is left")


if __name__ == "__main__":
    main()
