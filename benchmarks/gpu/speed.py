"""Part d: seconds and tokens/s of each phase beside the floor that this GPU's own rates allow."""

from typing import Any

from benchmarks.gpu.cell import Setup, SkipCell
from benchmarks.gpu.floors import Rates, StepWork, floor_seconds
from benchmarks.gpu.parts import WHOLE_RUN
from benchmarks.gpu.random_model import shape_named
from benchmarks.gpu.runner import Figures, read_result
from optimization.gpu import has_gpu
from optimization.rates import measured_rates


def phases_beside_floors(setup: Setup, figures: Figures) -> None:
    rates = measured_rates()
    figures.update(rates=vars(rates))
    figures.add_table(
        "rates",
        ("what", "measured"),
        [
            ["copy, read and write", f"{rates.copy_bytes_per_s / 1e12:.3f} TB/s"],
            ["bf16 product", f"{rates.matmul_flop_per_s / 1e12:.2f} TFLOP/s"],
        ],
    )
    whole_run = read_result(setup.out, WHOLE_RUN)
    if whole_run is None or whole_run.status != "ok" or whole_run.shape != setup.shape:
        raise SkipCell(f"the rates are measured; seconds of the phases come from part a, shape {setup.shape}")
    compare_with_floors(setup, figures, rates, whole_run.figures)


def compare_with_floors(setup: Setup, figures: Figures, rates: Rates, whole_run: dict[str, Any]) -> None:
    """The last logged step of part a beside its floors; the first step includes compilations."""
    step = whole_run["steps"][-1]
    work = StepWork(
        shape=shape_named(setup.shape),
        generator_precision="int8" if has_gpu() else "bf16",
        rows=whole_run["rows"],
        group=whole_run["rows"],
        prompt_len=whole_run["prompt_len"],
        completion_len=step["completions/mean_length"],
    )
    num_tokens = work.rows * work.completion_len
    rows = []
    for phase, floor_s in floor_seconds(work, rates).items():
        measured_s = step[f"time/{phase}_s"]
        rows.append(
            [
                phase,
                f"{measured_s:.2f}",
                f"{num_tokens / measured_s:.0f}",
                f"{floor_s:.3g}",
                f"{measured_s / floor_s:.1f}",
            ]
        )
    figures.add_table(
        f"phases of a step of {work.rows} completions, {work.prompt_len:.0f} + {work.completion_len:.0f} tokens",
        ("phase", "seconds", "tokens/s", "floor, seconds", "times the floor"),
        rows,
    )
