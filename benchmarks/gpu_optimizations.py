"""Benchmark of optimizations on a GPU: TF32, attention kernels, fp8 and compiled scoring, offloaded checkpoints.

Without a GPU it says so and ends with status 0.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from core.log import console
from optimization import check_fp8_support, compile_forward, quantise_to_fp8, setup_cuda_optimizations
from optimization.cuda_optim import optimize_attention_operations
from optimization.gpu import NO_CARD, find_card

NUM_CALLS = 10


def seconds_of(call: Callable[[], Any]) -> float:
    """Mean seconds of a call, after three calls to warm up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / NUM_CALLS


Comparison = tuple[str, float, float]
"""What it is, seconds the plain way, seconds with it."""


def comparisons() -> Iterator[Comparison]:
    """Name, plain seconds and optimized seconds of everything that this GPU can do."""
    yield from compare_settings()
    yield from compare_scoring()


def compare_settings() -> Iterator[Comparison]:
    a = torch.randn(4096, 4096, device="cuda")
    plain_s = seconds_of(lambda: a @ a)
    record = setup_cuda_optimizations()
    yield "TF32, 4096 x 4096 float32 product", plain_s, seconds_of(lambda: a @ a)
    record.undo()
    query = torch.randn(2, 28, 4096, 128, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 4096, 4096, dtype=torch.bool, device="cuda").tril()
    plain_s = seconds_of(lambda: scaled_dot_product_attention(query, query, query, attn_mask=mask))
    for backend in ("auto", "efficient"):  # auto: without cuDNN, which "plain" has from Hopper on
        record = optimize_attention_operations(backend)  # type: ignore[arg-type]
        first_s = seconds_of(lambda: scaled_dot_product_attention(query, query, query, attn_mask=mask))
        yield f"masked attention, {backend} first", plain_s, first_s
        record.undo()


@torch.no_grad()
def compare_scoring() -> Iterator[Comparison]:
    """Forward of a four-layer model with the widths of a 7B."""
    shape = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=4, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).cuda().eval()
    token_ids = torch.randint(1000, (4, 2048), device="cuda")

    def forward() -> Any:
        return model.get_decoder()(input_ids=token_ids, use_cache=False)

    plain_s = seconds_of(forward)
    record = compile_forward(model)
    yield "compiled forward", plain_s, seconds_of(forward)
    record.undo()
    if reason := check_fp8_support().skipped:
        console.print(f"fp8 forward: {reason}")
        return
    quantise_to_fp8(model)
    yield "fp8 forward", plain_s, seconds_of(forward)
    compile_forward(model)
    yield "fp8 forward, compiled", plain_s, seconds_of(forward)


def main() -> None:
    card = find_card()
    if card is None:
        console.print(f"nothing to measure: {NO_CARD}")
        return
    console.print(str(card))
    for what, plain_s, optimized_s in comparisons():
        milliseconds = f"{1e3 * plain_s:.2f} ms plain, {1e3 * optimized_s:.2f} ms"
        console.print(f"{what}: {milliseconds}, ratio {optimized_s / plain_s:.2f}")


if __name__ == "__main__":
    main()
