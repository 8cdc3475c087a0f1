"""Train a small language model from scratch on the embedded sums, with `optimization.Efficient`.

    python examples/train_small.py                          0.1 M parameters, half a minute on a CPU core
    python examples/train_small.py --size nano --optimizer adam8bit --lr 1e-3 --checkpointing

Prints the planned memory, the loss as it goes down, and how well the model solves held-out sums at the end, before and
after its weights are quantised.
"""

import argparse
import copy
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from core.log import configure_logging, console
from core.units import format_gb
from data.embedded.task import generate_rows
from data.embedded.tokenizer import build_tokenizer
from data.formats import encode
from optimization import Efficient
from optimization.gpu import pick_device
from optimization.optimizers import OPTIMIZERS
from optimization.small.models import BUILDERS, Size, model_config

TOY = Size(hidden=64, intermediate=160, num_layers=2, num_heads=2)
"""Far below nano; enough for the sums."""
NUM_TRAIN_ROWS, NUM_HELD_OUT_ROWS = 20_000, 256
NUM_WARMUP_STEPS = 20


def text_batch(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> Tensor:
    """[rows, tokens] `1+0+5+5+2` newline, its steps, its solution; every row has the same length."""
    texts = [f"{row['question']}\n{row['reasoning_trace']}{row['solution']}" for row in rows]
    return torch.tensor([encode(tokenizer, text) for text in texts])


def batches(tokenizer: PreTrainedTokenizerBase, batch: int, seed: int) -> Iterator[Tensor]:
    rows, rng = generate_rows(NUM_TRAIN_ROWS, seed, "train"), random.Random(seed)
    while True:
        yield text_batch(tokenizer, rng.sample(rows, batch))


@torch.no_grad()
def report(model: nn.Module, ids: Tensor, words: str) -> None:
    """Loss on held-out sums (nats per token; the digits of a question cannot be known) and share of right solutions."""
    model.eval()
    out = model(input_ids=ids, labels=ids)
    accuracy = (out.logits[:, -2].argmax(-1) == ids[:, -1]).float().mean().item()
    console.print(f"held-out, {words}: loss {out.loss.item():.3f}, {accuracy:.1%} of the sums right")


def train(args: argparse.Namespace) -> list[float]:
    """Train; returns the loss of every step."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    device = pick_device("auto").type
    if args.size == "toy":
        model = LlamaForCausalLM(model_config(TOY, len(tokenizer))).to(device)
    else:
        model = BUILDERS[args.size](len(tokenizer)).to(device)
    if args.checkpointing:
        Efficient.enable_checkpointing(model)
    optimizer = Efficient.get_optimizer(model, args.optimizer, lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, args.steps))
    # A CPU without 16-bit matrix units computes faster in float32.
    amp = Efficient.mixed_precision(model, optimizer, dtype=torch.float32 if device == "cpu" else None)
    held_out = text_batch(tokenizer, generate_rows(NUM_HELD_OUT_ROWS, args.seed, "eval")).to(device)
    planned = Efficient.estimate_memory(
        model,
        args.batch,
        held_out.shape[1],
        optimizer=args.optimizer,
        precision="fp32" if device == "cpu" else "mixed",
        checkpointing=args.checkpointing,
    )
    console.print(f"{Efficient.count_params(model) / 1e6:.1f} M parameters on {device}")
    console.print(f"planned peak {format_gb(planned.peak_bytes)} ({planned.binding_moment})")
    losses, start = [], time.monotonic()
    model.train()
    for step, ids in zip(range(1, args.steps + 1), batches(tokenizer, args.batch, args.seed), strict=False):
        with amp.autocast():
            loss = model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
        amp.step(loss)
        schedule.step()
        losses.append(loss.item())
        if step % max(1, args.steps // 10) == 0:
            left = (time.monotonic() - start) / step * (args.steps - step)
            console.print(f"step {step}/{args.steps}  loss {losses[-1]:.3f}  {left:.0f} s left")
    report(model, held_out, "trained weights")
    for bits in (8, 4):
        report(Efficient.quantize.static(copy.deepcopy(model), bits=bits), held_out, f"{bits}-bit weights")
    return losses


def lr_factor(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / NUM_WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["toy", *BUILDERS], default="toy")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="muon")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    configure_logging()
    train(parse())
