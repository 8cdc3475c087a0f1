"""Whole optimizer steps of the embedded size, generation included: ours against TRL's GRPOTrainer as it is.

    python -m benchmarks.end_to_end [--rows 32] [--repeats 2]

The same random model, prompts, batch, limits and reward on both sides. Ours: int8 base, vLLM (or --generator
transformers), packed batches. Stock: bf16 LoRA, transformers' generation, padded micro-batches, and the RLT reward
scored one completion after the other (benchmarks/score.py). Each side draws its own completions, so their tokens are
told beside the seconds. The sides take turns in one process; CPU seconds.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.paired import paired_seconds
from benchmarks.step import scored_one_by_one
from core.log import configure_logging, console
from rollout.types import Completion, Group, Rollout
from tests.helpers.tiny_run import make_planned_trainer, write_random_model

NUM_GENERATIONS, MICRO_ROWS, MAX_COMPLETION_LEN = 8, 8, 48


class Sides:
    """Both trainers on one model and one set of prompts, and the tokens that each has sampled."""

    def __init__(self, folder: Path, words: argparse.Namespace) -> None:
        model = write_random_model(folder / "model", initializer_range=0.02)
        self.num_rows, self.num_tokens = words.rows, {"ours": 0, "stock TRL": 0}
        self.ours = make_planned_trainer(
            model,
            folder / "ours",
            *(f"train_batch_size={words.rows}", f"per_device_train_batch_size={MICRO_ROWS}", "num_eval_prompts=0"),
            *(f"num_generations={NUM_GENERATIONS}", f"generator={words.generator}", "canary_tolerance=1"),
        )
        self.rows = [self.ours.train_dataset[i] for i in range(words.rows // NUM_GENERATIONS)]
        self.stock = self._make_stock(model, folder / "stock")

    def our_step(self) -> None:
        trainer = self.ours
        trainer._rollout = None
        trainer.model.train()
        trainer.training_step(trainer.model, self.rows, None)
        trainer.model.zero_grad()
        trainer.sampler.synced_version = None  # the adapter of the next step is another one
        self.num_tokens["ours"] = sum(len(c.token_ids) for c in trainer._rollout.completions)

    def stock_step(self) -> None:
        trainer: Any = self.stock
        trainer._step, trainer._buffered_inputs = 0, None
        inputs = [{"prompt": "q"}] * self.num_rows
        for _ in range(self.num_rows // MICRO_ROWS):
            trainer.model.train()
            trainer.training_step(trainer.model, inputs, None)
        trainer.model.zero_grad()

    def _make_stock(self, model: Path, folder: Path) -> GRPOTrainer:
        """Given the prompts' ids and the reward; everything else is TRL's own."""
        scorer = scored_one_by_one(self.ours)

        def reward(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
            self.num_tokens["stock TRL"] = sum(map(len, completion_ids))
            drawn = [
                Completion(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop") for ids in completion_ids
            ]
            groups = tuple(
                replace(Group.of_row(row), completions=tuple(drawn[p * NUM_GENERATIONS : (p + 1) * NUM_GENERATIONS]))
                for p, row in enumerate(self.rows)
            )
            return scorer(Rollout(groups=groups)).breakdown.reward.tolist()

        args, num_micro = self.ours.config.model_args, self.num_rows // MICRO_ROWS
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear")
        stock: Any = GRPOTrainer(
            model=get_peft_model(base, lora),
            reward_funcs=[reward],
            args=GRPOConfig(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                per_device_train_batch_size=MICRO_ROWS,
                gradient_accumulation_steps=num_micro,
                num_generations=NUM_GENERATIONS,
                max_completion_length=MAX_COMPLETION_LEN,
                beta=0.04,
            ),
            train_dataset=Dataset.from_list([{"prompt": "q"}] * 64),
            processing_class=self.ours.processing_class,
        )
        stock.current_gradient_accumulation_steps, self.ours.current_gradient_accumulation_steps = num_micro, 1
        prompts = [row["prompt_ids"] for row in self.rows for _ in range(NUM_GENERATIONS)]
        stock._tokenize_prompts = lambda _: (prompts, None, {})
        return stock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--generator", choices=("vllm", "transformers"), default="vllm")
    words = parser.parse_args()
    configure_logging("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), words)
        seconds = paired_seconds({"ours": sides.our_step, "stock TRL": sides.stock_step}, words.repeats)
        sides.ours.close()
    console.print(f"{words.rows} completions a step, embedded size; ours samples with {words.generator}")
    console.print(f"{'':12}{'CPU s a step':>14}{'tokens/s':>10}{'tokens':>8}")
    for name, side_s in seconds.items():
        console.print(f"{name:12}{side_s:14.2f}{sides.num_tokens[name] / side_s:10.0f}{sides.num_tokens[name]:8}")
    console.print(f"ratio stock / ours: {seconds['stock TRL'] / seconds['ours']:.2f}")


if __name__ == "__main__":
    main()
