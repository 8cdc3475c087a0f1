"""Rates of the device at hand, measured in seconds: copies, products, blocks of a few widths, one operation.

    python -m optimization.rates [--again]      measure this machine's CPU, keep the figures, show them

A CPU's are kept in the cache folder, so that a plan of time (planner/time.py) finds them without torch.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.log import console, log
from optimization.gpu import find_card, has_gpu, pick_device
from planner.rates import Rates, cpu_name, cpu_rates_file, num_threads, rates_as_json, rates_of_gpu, saved_cpu_rates

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
_MATMUL_WIDTH = {"cuda": 8192, "cpu": 512}
_NUM_CALLS = 10
_BLOCK_ROWS = {64: 16, 256: 8, 768: 4}
"""Hidden size -> rows of a forward of the probe's block."""
LIBRARY_FACTOR = 3.3
"""What an operation takes among the modules of transformers and peft, in units of one among the probe's (measured)."""
_ROW_LEN, _ADAPTER_RANK, _HEAD_DIM = 128, 16, 32


def rates_here(device: torch.device, *, measures: bool = True) -> Rates | None:
    """Rates of the device of a run: of its table or, on a CPU, measured once (some seconds) and kept.

    None: a GPU that the table does not know, or a CPU that was not measured where `measures` is False.
    """
    if device.type == "cuda":
        card = find_card()
        return rates_of_gpu(card.name) if card is not None else None
    if (saved := saved_cpu_rates()) is not None or not measures:
        return saved
    rates = measured_cpu_rates()
    file = cpu_rates_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")  # two runs may measure at once
        partial.write_text(rates_as_json(rates), encoding="utf-8")
        partial.replace(file)
        log.info("measured how fast this CPU is, for the plan of time: %s", file)
    except OSError as error:  # a cache that cannot be written costs the next run some seconds, and this one nothing
        log.warning("how fast this CPU is could not be kept for the next run's plan of time: %s", error)
    return rates


def measured_rates() -> Rates:
    """Rates of a large copy on the device and of a large square bf16 product."""
    device = pick_device("auto").type
    source = torch.empty(_COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target, width = torch.empty_like(source), _MATMUL_WIDTH[device]
    a = torch.randn(width, width, device=device).bfloat16()
    return Rates(
        copy_bytes_per_s=2 * source.nbytes / seconds_of(lambda: target.copy_(source)),
        matmul_flop_per_s=2.0 * width**3 / seconds_of(lambda: a @ a),
    )


def measured_cpu_rates(clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Of this machine's CPU, with the threads that torch has now."""
    with torch.random.fork_rng(devices=[]):
        source = torch.empty(_COPY_BYTES["cpu"], dtype=torch.uint8).fill_(1)
        target, width = torch.empty_like(source), _MATMUL_WIDTH["cpu"]
        a = torch.randn(width, width).bfloat16()
        return Rates(
            copy_bytes_per_s=2 * source.nbytes / seconds_of(lambda: target.copy_(source), clock=clock),
            matmul_flop_per_s=2.0 * width**3 / seconds_of(lambda: a @ a, clock=clock),
            op_s=LIBRARY_FACTOR * _seconds_of_op(clock),
            by_width={name: _block_rates(dtype, clock, training) for name, (dtype, training) in _KINDS.items()},
            name=f"{cpu_name()}, {num_threads()} threads",
        )


_KINDS = {
    "bf16 forward": (torch.bfloat16, False),
    "bf16 training": (torch.bfloat16, True),
    "fp32 forward": (torch.float32, False),
    "fp32 training": (torch.float32, True),
}


class _Linear(nn.Module):
    """A frozen linear with a float32 adapter, as peft computes it."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out, bias=False, dtype=dtype).requires_grad_(False)
        self.a, self.b = nn.Linear(n_in, _ADAPTER_RANK, bias=False), nn.Linear(_ADAPTER_RANK, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.b(self.a(x.float())) * 2.0).to(x.dtype) if self.training else y


class _Block(nn.Module):
    """One decoder block: norms in float32, rotary positions, attention, gated MLP."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        inner = 3 * width
        self.norms = nn.ParameterList(torch.ones(width, dtype=dtype).requires_grad_(False) for _ in range(2))
        self.q, self.k, self.v, self.o = (_Linear(width, width, dtype) for _ in range(4))
        self.gate, self.up = (_Linear(width, inner, dtype) for _ in range(2))
        self.down = _Linear(inner, width, dtype)
        self.num_adapter_params = _ADAPTER_RANK * (8 * width + 3 * (width + inner))
        self.num_params = 4 * width**2 + 3 * width * inner

    def forward(self, x: Tensor) -> Tensor:
        normed = _norm(x, self.norms[0])
        q, k, v = (linear(normed).unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_turned(q), _turned(k), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        normed = _norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * 0.6 + torch.cat((-high, low), -1) * 0.8


def _block_rates(dtype: torch.dtype, clock: Callable[[], float], training: bool) -> dict[int, float]:
    """Operations a second of a block, by width; the time of its launches is taken off."""
    op_s, rates = _seconds_of_op(clock), dict[int, float]()
    for width, num_rows in _BLOCK_ROWS.items():
        block, x = _Block(width, dtype), torch.randn(num_rows, _ROW_LEN, width, dtype=dtype)
        run = _training(block, x) if training else _scoring(block, x)
        computing_s = seconds_of(run, clock=clock, num_calls=2)
        computing_s -= min(op_s * count_ops(run), 0.7 * computing_s)
        attention = (3.5 if training else 1.0) * 2.0 * num_rows * _ROW_LEN**2 * width
        linear = (2 if training else 1) * 2.0 * block.num_params * num_rows * _ROW_LEN
        linear += 6.0 * block.num_adapter_params * num_rows * _ROW_LEN if training else 0.0
        rates[width] = (linear + attention) / computing_s
    return rates


def _scoring(block: _Block, x: Tensor) -> Callable[[], Any]:
    block.eval()

    def run() -> None:
        with torch.no_grad():
            block(x)

    return run


def _training(block: _Block, x: Tensor) -> Callable[[], Any]:
    block.train()
    x.requires_grad_()
    return lambda: block(x).sum().backward()


def _seconds_of_op(clock: Callable[[], float]) -> float:
    """Seconds of an operation of a block that computes next to nothing, Python around it included."""
    run = _scoring(_Block(64, torch.float32), torch.randn(1, 4, 64))
    return seconds_of(run, clock=clock, num_calls=50) / count_ops(run)


class _Counter(TorchDispatchMode):
    """Counts what Python asks torch to do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += 1
        return func(*args, **(kwargs or {}))


def count_ops(call: Callable[[], Any]) -> int:
    """Operations that a call asks torch for, views included."""
    with _Counter() as counter:
        call()
    return counter.num_ops


def seconds_of(
    call: Callable[[], Any], *, clock: Callable[[], float] = time.perf_counter, num_calls: int = _NUM_CALLS
) -> float:
    """The fastest of some calls: a rate is what the device can do."""
    seconds = []
    for _ in range(1 + num_calls):
        started = clock()
        call()
        if has_gpu():
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure anew")
    if parser.parse_args().again:
        cpu_rates_file().unlink(missing_ok=True)
    rates = rates_here(torch.device("cpu"))
    assert rates is not None
    console.print(
        f"{rates.words}: copy {rates.copy_bytes_per_s / 1e9:.1f} GB/s, an operation {rates.op_s * 1e6:.1f} us"
    )
    for kind, points in rates.by_width.items():
        shown = ", ".join(f"{width}: {rate / 1e9:.0f}" for width, rate in points.items())
        console.print(f"  {kind}, blocks by width, GFLOP/s: {shown}")


if __name__ == "__main__":
    main()
