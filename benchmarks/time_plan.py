"""The plan of time beside measured steps: the embedded run, and one of 0.1 billion parameters, on this CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.time_plan [--steps 4] [--runs embedded 0.1b]

Measures the machine's rates, trains some steps, and prints for each phase the plan's seconds for the lengths that came
beside the measured ones (the median of the steps after the first), their ratio, and the shares of the step. CPU seconds
of the process, so that other work on the machine counts little.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from core.log import configure_logging, console
from core.types import Phase
from models.load import resolve_model_path
from optimization.rates import measured_cpu_rates
from planner.rates import Rates
from planner.time import TimePlan, plan_time
from runs.metrics import METRICS_FILE, read_metrics
from tests.helpers.tiny_run import make_planned_trainer, write_random_model
from trainers.time_plan import lengths_of_steps

RUNS = {
    "embedded": ("train_batch_size=64",),
    "0.1b": (
        "train_batch_size=16",
        "per_device_train_batch_size=16",
        "canary_tolerance=1",
        "model_args.device_map=cpu",
    ),
}
"""Run -> settings over `teacher_rlt_tiny`."""
MAX_STEP_RATIO, MAX_SHARE_DIFFERENCE = 1.3, 0.1
"""What the plan is held to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    words = parser.parse_args()
    configure_logging("WARNING")
    rates = measured_cpu_rates(time.process_time)
    console.print(f"copy {rates.copy_bytes_per_s / 1e9:.1f} GB/s, an operation {rates.op_s * 1e6:.2f} us")
    for name in words.runs:
        with tempfile.TemporaryDirectory() as folder:
            measured, plan = measure(name, Path(folder), words.steps, rates)
        show(name, measured, plan)


def measure(name: str, folder: Path, num_steps: int, rates: Rates) -> tuple[dict[Phase, float], TimePlan]:
    """Seconds of each phase in the median step after the first, and the plan for the steps' mean lengths."""
    if name == "embedded":
        model = Path(resolve_model_path("tiny"))
    else:
        model = write_random_model(folder / "model", hidden=768, num_layers=12, initializer_range=0.02)
    trainer = make_planned_trainer(
        model, folder / "run", *RUNS[name], f"max_steps={num_steps + 1}", "eval_strategy=no", "save_strategy=no"
    )
    trainer.meter.clock = time.process_time
    trainer.meter.mark()
    trainer.train()
    steps = [line for line in read_metrics(folder / "run" / METRICS_FILE) if "time/train_s" in line][1:]
    plan = plan_time(trainer.plan.settings, rates, lengths_of_steps(trainer, steps), num_steps=num_steps)
    assert plan is not None
    trainer.close()
    return {phase: median(line[f"time/{phase}_s"] for line in steps) for phase in plan.seconds}, plan


def show(name: str, measured: Mapping[Phase, float], plan: TimePlan) -> None:
    total = sum(measured.values())
    console.print(f"\n{name}: {plan.lengths.words}; step {total:.3f} s measured, {plan.step_s:.3f} planned")
    console.print(f"{'':10}{'measured s':>12}{'planned s':>12}{'ratio':>8}{'share':>8}{'planned':>9}")
    for phase, seconds in measured.items():
        console.print(
            f"{phase:10}{seconds:12.3f}{plan.seconds[phase]:12.3f}{plan.seconds[phase] / seconds:8.2f}"
            f"{seconds / total:8.2f}{plan.shares[phase]:9.2f}"
        )
    far = max(abs(plan.shares[phase] - measured[phase] / total) for phase in measured)
    ratio = plan.step_s / total
    holds = 1 / MAX_STEP_RATIO <= ratio <= MAX_STEP_RATIO and far <= MAX_SHARE_DIFFERENCE
    console.print(
        f"step {ratio:.2f} of the measured one, shares at most {far:.2f} apart: {'holds' if holds else 'missed'}"
    )


if __name__ == "__main__":
    main()
