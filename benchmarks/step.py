"""Seconds of a training step without generation: rewards, reference, loss and backward, ours against stock TRL.

    python -m benchmarks.step [--rows 16] [--repeats 3] [--layers 12 --hidden 768] [--layout packed]

A random model of 0.1 billion parameters, float32, LoRA; prompts of about 400 tokens, completions of median 150 with a
long tail. Both sides get the same completions. Stock is TRL's GRPOTrainer with micro-batches of two rows, padded to the
step's longest prompt and completion, and the RLT reward scored one completion after the other (benchmarks/score.py).
The sides take turns in one process; printed are ratios of CPU seconds.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.paired import paired_seconds
from benchmarks.score import padded_share, plain_score
from core.log import configure_logging, console
from core.types import Role
from generation.policy import PolicySampler
from rollout.packed_attention import layout_of
from rollout.types import Completion, Group, Rollout, ScoringRow
from tests.helpers.tiny_run import make_trainer, write_random_model

NUM_GENERATIONS, MICRO_ROWS, MAX_PROMPT_LEN, MAX_COMPLETION_LEN = 8, 2, 1024, 1024


class Fixed:
    """Stand-in for generator and canary that returns given completions."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def sync_adapter(self, model: Any) -> None: ...

    def check(self) -> None: ...

    def generate(self, *_: Any, **__: Any) -> list[Completion]:
        return self.completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layout", choices=("auto", "packed", "padded"), default="auto")
    words = parser.parse_args()
    configure_logging("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), words)


def measure(folder: Path, words: argparse.Namespace) -> None:
    model = write_random_model(folder / "model", hidden=words.hidden, num_layers=words.layers)
    ours = make_trainer(
        model,
        folder / "ours",
        *("model_args.load_in_8bit=false", "model_args.torch_dtype=float32", "num_eval_prompts=0"),
        f"model_args.sequence_layout={words.layout}",
        *(f"train_batch_size={words.rows}", f"num_generations={NUM_GENERATIONS}", "student_model=null"),
        *(f"per_device_train_batch_size={MICRO_ROWS}", f"max_completion_length={MAX_COMPLETION_LEN}"),
    )
    groups = draw_groups(ours, words.rows // NUM_GENERATIONS)
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(g.prompt_ids) + len(c.token_ids) for g in groups for c in g.completions]
    stock = make_stock(ours, model, folder / "stock", groups, completions, words.rows)
    rows = [{"prompt": "", "prompt_ids": g.prompt_ids, "question": g.question, "solution": g.solution} for g in groups]
    ours.sampler = PolicySampler(ours.host, Fixed(completions), Fixed(completions), seed=0)

    def our_step() -> None:
        ours._rollout = None
        one_step(ours, rows)

    def stock_step() -> None:
        stock._step, stock._buffered_inputs = 0, None
        for _ in range(words.rows // MICRO_ROWS):
            one_step(stock, rows * NUM_GENERATIONS)

    seconds = paired_seconds({"ours": our_step, "stock TRL": stock_step}, words.repeats)
    longest_p, longest_c = max(len(g.prompt_ids) for g in groups), max(len(c.token_ids) for c in completions)
    layout = layout_of(ours.host.teacher)
    scoring_rows = [row.scoring_row for row in Rollout(groups=tuple(groups)).rows]
    ours_share = padded_share(scoring_rows, layout, ours.plan.settings.micro_batch_tokens)
    stock_share = 1 - sum(lengths) / (len(lengths) * (longest_p + longest_c))
    console.print(f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens; layout {layout}")
    console.print(f"padded share: ours {ours_share:.3f}, stock {stock_share:.3f}")
    num_tokens = sum(len(c.token_ids) for c in completions)
    for name, side_s in seconds.items():
        console.print(f"{name}: {side_s:.2f} CPU s per step, {num_tokens / side_s:.0f} completion tokens/s")
    console.print(f"ratio stock / ours: {seconds['stock TRL'] / seconds['ours']:.2f}")


def one_step(trainer: Any, rows: list[dict[str, Any]]) -> None:
    trainer.model.train()
    trainer.training_step(trainer.model, rows, None)
    trainer.model.zero_grad()


def draw_groups(ours: Any, num_prompts: int) -> list[Group]:
    """Questions of about 400 tokens, completions of median 150 with a long tail; ids are letters and digits."""
    generator = np.random.default_rng(0)
    groups = []
    for p in range(num_prompts):
        row = ours.train_dataset[p]
        prompt_ids = row["prompt_ids"] + generator.integers(20, 90, int(generator.normal(300, 50))).tolist()
        lengths = np.clip(np.exp(generator.normal(np.log(150), 0.9, NUM_GENERATIONS)), 8, MAX_COMPLETION_LEN)
        completions = [
            Completion(
                token_ids=generator.integers(20, 90, int(n)).tolist(),
                logprobs=[-4.0] * int(n),
                finish_reason="length",
            )
            for n in lengths
        ]
        group = Group(question=row["question"], solution=row["solution"], prompt_ids=prompt_ids[:MAX_PROMPT_LEN])
        groups.append(replace(group, completions=tuple(completions)))
    return groups


def scored_one_by_one(ours: Any) -> Any:
    """The RLT reward of a trainer of ours, its rows scored as the published code does it."""

    def one_by_one(role: Role, rows: Sequence[ScoringRow], _: float) -> Any:
        with ours.host.acting_as(role) as scored:
            return plain_score(scored, rows, collect=False)

    scorer = copy.copy(ours.scorer)
    scorer._score = one_by_one
    return scorer


def make_stock(
    ours: Any, model: Path, folder: Path, groups: list[Group], completions: list[Completion], num_rows: int
) -> GRPOTrainer:
    """TRL's trainer with the same completions, the same reward, and micro-batches of `MICRO_ROWS` rows."""

    plain_scorer = scored_one_by_one(ours)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return plain_scorer(Rollout(groups=tuple(groups))).breakdown.reward.tolist()

    args = ours.config.model_args
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stock = GRPOTrainer(
        model=get_peft_model(base, LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear")),
        reward_funcs=[reward],
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=MICRO_ROWS,
            gradient_accumulation_steps=num_rows // MICRO_ROWS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_COMPLETION_LEN,
            beta=0.04,
        ),
        train_dataset=Dataset.from_list([{"prompt": "q"}] * 64),
        processing_class=ours.processing_class,
    )
    stock.current_gradient_accumulation_steps, ours.current_gradient_accumulation_steps = num_rows // MICRO_ROWS, 1
    prompts = [g.prompt_ids for g in groups for _ in range(NUM_GENERATIONS)]
    stock._tokenize_prompts = lambda _: (prompts, None, {})
    stock._generate_single_turn = lambda *_, **__: ([c.token_ids for c in completions], None)
    return stock


if __name__ == "__main__":
    main()
