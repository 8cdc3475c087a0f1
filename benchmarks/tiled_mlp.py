"""Tiled against plain MLP: the planned memory of a 7B step, and the time of a training step on this machine's CPU."""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.log import console
from core.units import gb
from optimization import tile_mlps
from planner.activations import train_activation_bytes
from planner.teacher import teacher_settings
from schemas.compose import compose_run_config
from schemas.run import load_run_config

TILE_TOKENS, NUM_STEPS = 256, 5


def step_s(model: LlamaForCausalLM, token_ids: torch.Tensor) -> float:
    """Fastest of a few forward and backward passes, in seconds."""
    seconds = []
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    for words in ([], ["offload_checkpoints=true"]):
        config = load_run_config(compose_run_config("teacher_rlt_mono_85gb", words))
        settings = teacher_settings(config)
        plain, tiled = (train_activation_bytes(replace(settings, mlp_tile_tokens=n)) for n in (None, 2048))
        run = " ".join(["teacher_rlt_mono_85gb", *words])
        figures = f"{gb(plain):.2f} GB plain, {gb(tiled):.2f} GB in tiles of 2048 tokens (predicted)"
        console.print(f"activations of {run}: {figures}, ratio {tiled / plain:.2f}")
    shape = LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=512)
    model = LlamaForCausalLM(shape)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    token_ids = torch.randint(512, (2, 1024))
    step_s(model, token_ids)
    plain_s = step_s(model, token_ids)
    tile_mlps(model, TILE_TOKENS)
    tiled_s = step_s(model, token_ids)
    console.print(
        f"CPU step: {plain_s:.2f} s plain, {tiled_s:.2f} s in tiles of {TILE_TOKENS}, ratio {tiled_s / plain_s:.2f}"
    )


if __name__ == "__main__":
    main()
