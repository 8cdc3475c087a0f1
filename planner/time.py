"""The plan of time: seconds per phase and step, hours of a run and tokens/s, from shapes, lengths and rates.

What a method does in a step is its settings' own (`PlanSettings.step_work`); here it is divided by the rates of a
device (planner/rates.py) and shown. Nothing here was measured, except where the rates were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from core.types import Phase
from core.units import format_duration
from planner.rates import Rates
from planner.settings import PlanSettings

EXPECTED_PROMPT_FRAC, EXPECTED_COMPLETION_FRAC = 1 / 6, 1 / 3
"""Means as shares of the limits, before any row was seen (assumed: 1k + 2k tokens where 6k + 6k are allowed)."""
EXPECTED_SOLUTION_FRAC = 1 / 2
"""Of a prompt: a teacher's prompt is question and solution."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the rows of a step: means, and the longest completion, for which the others wait."""

    prompt: float
    completion: float
    longest_completion: float
    solution: float
    """Part of the prompt for the teacher, of the answer for the student."""
    source: str
    """Where they are from, in words."""

    @staticmethod
    def full(max_prompt_len: int, max_completion_len: int) -> "Lengths":
        return Lengths(
            prompt=max_prompt_len,
            completion=max_completion_len,
            longest_completion=max_completion_len,
            solution=max_prompt_len * EXPECTED_SOLUTION_FRAC,
            source="every row as long as allowed",
        )

    @staticmethod
    def expected(max_prompt_len: int, max_completion_len: int) -> "Lengths":
        prompt = max_prompt_len * EXPECTED_PROMPT_FRAC
        return Lengths(
            prompt=prompt,
            completion=max_completion_len * EXPECTED_COMPLETION_FRAC,
            longest_completion=max_completion_len,
            solution=prompt * EXPECTED_SOLUTION_FRAC,
            source="lengths assumed: a sixth of the prompt's limit, a third of the completion's",
        )

    @property
    def words(self) -> str:
        return f"{self.prompt:.0f} + {self.completion:.0f} tokens a row"


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Predicted seconds of an optimizer step, phase by phase."""

    seconds: Mapping[Phase, float]
    """Of the phases that a step has."""
    rates: Rates
    lengths: Lengths
    num_rows: int
    """Of a step."""
    num_steps: int | None
    """None: as many as the dataset makes."""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[Phase, float]:
        return {phase: seconds / self.step_s for phase, seconds in self.seconds.items()}

    @property
    def tokens_per_s(self) -> float:
        """Tokens of completions that are sampled and learned from."""
        return self.num_rows * self.lengths.completion / self.step_s

    @property
    def run_s(self) -> float | None:
        """Of all steps, without start and evaluations."""
        return None if self.num_steps is None else self.num_steps * self.step_s

    @property
    def line(self) -> str:
        """In one line: the step, its phases, the run."""
        phases = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in self.seconds.items())
        run = f"; {self.num_steps} steps {format_duration(self.run_s)}" if self.run_s is not None else ""
        return (
            f"{self.step_s:.3g} s a step ({phases}){run}; {self.tokens_per_s:.0f} completion tokens/s; "
            f"{self.lengths.words}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For json; every figure labelled as predicted."""
        return {
            "label": "predicted",
            "rates": self.rates.words,
            "lengths": self.lengths.words,
            "lengths_from": self.lengths.source,
            "seconds": {phase.value: round(seconds, 4) for phase, seconds in self.seconds.items()},
            "step_s": round(self.step_s, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "num_steps": self.num_steps,
            "run_hours": None if self.run_s is None else round(self.run_s / 3600, 3),
        }


def plan_time(
    settings: PlanSettings, rates: Rates, lengths: Lengths, *, num_steps: int | None = None
) -> TimePlan | None:
    """Seconds of what a step of a run does in each phase; None: its method has no plan of time.

    `num_steps: None` is the configuration's own, where it says one.
    """
    work = settings.step_work(lengths, rates)
    if not work:
        return None
    return TimePlan(
        seconds={phase: sum(part.seconds(rates) for part in parts) for phase, parts in work.items()},
        rates=rates,
        lengths=lengths,
        num_rows=settings.train_batch,
        num_steps=settings.num_steps if num_steps is None else num_steps,
    )


def time_table(plans: Sequence[TimePlan], *, title: str) -> Table:
    """One row per plan: seconds of each phase, of the step, tokens/s, hours of the run."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    phases = [phase for phase in Phase if any(phase in plan.seconds for plan in plans)]
    for column in ("lengths", *(f"{phase} s" for phase in phases), "step s", "tokens/s", "run"):
        table.add_column(column, justify="left" if column == "lengths" else "right")
    for plan in plans:
        run = format_duration(plan.run_s) if plan.run_s is not None else "?"
        cells = [f"{plan.seconds.get(phase, 0.0):.3g}" for phase in phases]
        table.add_row(plan.lengths.words, *cells, f"{plan.step_s:.3g}", f"{plan.tokens_per_s:.0f}", run)
    return table
