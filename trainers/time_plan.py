"""The plan of time of a run that is about to start, and beside what it took.

Lengths are of the run's own rows: of its dataset before the first step, of its steps afterwards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from core.log import log
from core.types import Phase
from optimization.rates import rates_here
from planner.time import EXPECTED_COMPLETION_FRAC, Lengths, plan_time
from runs.metrics import METRICS_FILE, read_metrics

_NUM_SAMPLED = 256
"""Rows of the dataset that are looked at."""


def tell_time_plan(trainer: Any) -> None:
    """Log what a step and the run will take, where the rates of the device are known."""
    rates = rates_here(trainer.meter.device)
    if rates is None:
        log.info("no plan of time: the rates of this GPU are not known (planner/rates.py)")
        return
    plan = plan_time(trainer.plan.settings, rates, lengths_of_dataset(trainer), num_steps=trainer.args.max_steps)
    if plan is not None:
        log.info("predicted: %s (%s; %s)", plan.line, plan.rates.words, plan.lengths.source)


def time_beside_plan(trainer: Any) -> dict[str, Any]:
    """For the summary: seconds of a step by phase as measured, and as planned for the lengths that came.

    Empty where nothing was logged, or no plan can be made. The median over the steps after the first, which includes
    what is done once.
    """
    steps = [line for line in read_metrics(Path(trainer.args.output_dir, METRICS_FILE)) if "time/train_s" in line]
    steps = steps[1:] or steps
    rates = rates_here(trainer.meter.device, measures=False)
    if not steps or rates is None or "completions/mean_length" not in steps[0]:
        return {}
    lengths = lengths_of_steps(trainer, steps)
    plan = plan_time(trainer.plan.settings, rates, lengths, num_steps=trainer.args.max_steps)
    if plan is None:
        return {}
    measured = {phase: seconds_of_step(trainer, steps, phase) for phase in plan.seconds}
    return {
        "rates": rates.words,
        "lengths": lengths.words,
        "tokens_per_s": plan.num_rows * lengths.completion / sum(measured.values()),
        "phases": {
            str(phase): {"planned_s": plan.seconds[phase], "measured_s": measured[phase]} for phase in plan.seconds
        },
    }


def seconds_of_step(trainer: Any, steps: Sequence[Mapping[str, Any]], phase: Phase) -> float:
    """Median over logged steps; a line counts all steps since the one before."""
    return median(step.get(f"time/{phase}_s", 0.0) for step in steps) / max(1, int(trainer.args.logging_steps))


def lengths_of_dataset(trainer: Any) -> Lengths:
    """Prompts as they are; completions, which are not known yet, as the plan expects them."""
    limit = trainer.plan.settings.max_completion_len
    prompt, solution = _prompt_lengths(trainer)
    return Lengths(
        prompt=prompt,
        completion=limit * EXPECTED_COMPLETION_FRAC,
        longest_completion=limit,
        solution=solution,
        source="prompts of the dataset, completions assumed: a third of their limit",
    )


def lengths_of_steps(trainer: Any, steps: Sequence[Mapping[str, Any]]) -> Lengths:
    """Means over logged steps."""
    prompt, solution = _prompt_lengths(trainer)
    return Lengths(
        prompt=prompt,
        completion=mean(step["completions/mean_length"] for step in steps),
        longest_completion=mean(step["completions/max_length"] for step in steps),
        solution=solution,
        source="the run's own",
    )


def _prompt_lengths(trainer: Any) -> tuple[float, float]:
    """Mean tokens of a prompt, and of a solution."""
    rows = trainer.train_dataset.select(range(min(_NUM_SAMPLED, len(trainer.train_dataset))))
    solutions = trainer.processing_class(list(rows["solution"]), add_special_tokens=False)["input_ids"]
    return mean(map(len, rows["prompt_ids"])), mean(map(len, solutions))
