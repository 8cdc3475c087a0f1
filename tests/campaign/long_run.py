"""A long run of the smallest size: memory, handles, threads and time per step do not grow."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tests.campaign.lab import Lab, Program, Trial, comparable
from tests.campaign.process import Process
from tests.campaign.tally import Tally

_WARM_UP_FRAC = 0.3
"""Of the steps: allocators and caches fill, and the schedule of saving and logging settles."""
_MAY_GROW_PER_1000_STEPS = {"memory MB": 48.0, "handles": 1.0, "threads": 0.5, "CPU ms per step": 25.0}
"""Python's own objects grow by 8 MB per 1000 steps (the history of the log). The rest of what is allowed is memory that
torch keeps for the shapes of packed batches, each of which differs: at its end a run of 900 steps grows by 19 MB per
1000, one of padded batches by 5."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def run_long(lab: Lab, tally: Tally, program: Program, num_steps: int) -> None:
    trial = lab.trial(program)
    words = (f"max_steps={num_steps}", f"save_steps={max(2, num_steps // 10)}", f"eval_steps={max(2, num_steps // 10)}")
    samples = _watch(trial, trial.start(*words))
    kept = [sample for sample in samples if sample["step"] >= _WARM_UP_FRAC * num_steps]
    if len(kept) < 10:
        raise AssertionError(f"{len(kept)} samples of a run of {num_steps} steps: too few for a slope")
    for name, allowed in _MAY_GROW_PER_1000_STEPS.items():
        values = _per_step(kept) if name.startswith("CPU") else [sample[name] for sample in kept]
        slope, half_width = slope_and_interval([sample["step"] for sample in kept][-len(values) :], values)
        tally.notes[name] = f"{1000 * slope:+.2f} ± {1000 * half_width:.2f} per 1000 steps"
        grows = 1000 * (slope - half_width) > allowed
        tally.count(f"{program.name}, {name}", [tally.notes[name]] * grows)


def _watch(trial: Trial, process: Process) -> list[dict[str, float]]:
    samples: list[dict[str, float]] = []
    while process.is_alive:
        sample = _sample(process.pid, trial.run / "metrics.jsonl")
        if sample and (not samples or sample["step"] > samples[-1]["step"]):
            samples.append(sample)
        time.sleep(0.2)
    ended = process.end()
    assert ended.status == 0 and not ended.num_tracebacks, ended.last_lines
    return samples


def _sample(pid: int, metrics: Path) -> dict[str, float] | None:
    """What the kernel says of a process, and the step that it logged last; None where it has none yet, or has ended."""
    try:
        step = max((line["step"] for line in comparable(metrics)[-2:]), default=0)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        handles = len(os.listdir(f"/proc/{pid}/fd"))
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, ValueError):
        return None
    cpu_ms = 1000 * (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return {"step": step, "memory MB": resident, "handles": handles, "threads": int(fields[17]), "CPU ms": cpu_ms}


def _per_step(samples: Sequence[dict[str, float]]) -> list[float]:
    pairs = zip(samples, samples[1:], strict=False)
    return [(b["CPU ms"] - a["CPU ms"]) / (b["step"] - a["step"]) for a, b in pairs]


def slope_and_interval(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and half the width of its 95 % interval (normal errors, no autocorrelation)."""
    n, mean_x, mean_y = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, 1.96 * math.sqrt(residual / max(1, n - 2) / spread)
