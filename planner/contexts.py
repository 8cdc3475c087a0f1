"""Contexts from 1k to 64k tokens on one GPU: seconds and memory of a step, cost of a token, and the longest that fits.

    python -m planner.contexts [--config-name teacher_rlt_mono_85gb] [--gpu-gb 85] [key=value ...]

One row at a time in training, prompt and completion in the configuration's proportion, every row as long as allowed.
All figures are predicted; the longest context of a GPU is not measured on any yet.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from core.errors import UserError
from core.log import console
from core.types import Phase
from core.units import format_gb, gb
from planner.fit import largest_context, with_row_len
from planner.planned import Planned, plan_config, rates_for_plan
from planner.rates import Rates
from planner.settings import PlanSettings
from planner.time import Lengths, TimePlan, plan_time
from schemas.compose import run_config_name

CONTEXTS = tuple(1024 * 2**power for power in range(7))
_SHOWN_PHASES = (Phase.GENERATE, Phase.SCORE, Phase.TRAIN)


@dataclass(frozen=True, kw_only=True)
class Context:
    """A step whose rows are all of one length."""

    row_len: int
    peak_bytes: int
    fits: bool
    time: TimePlan

    def seconds_per_million_tokens(self, phase: Phase) -> float:
        """Of prompts and completions as a user counts them."""
        return self.time.seconds[phase] / (self.time.num_rows * self.row_len) * 1e6


def contexts(settings: PlanSettings, gpu_bytes: int, rates: Rates) -> list[Context]:
    """Plans of memory and of time at each of `CONTEXTS`.

    Raises:
        UserError: the method of the run has no plan of time.
    """
    found = []
    for row_len in CONTEXTS:
        at = with_row_len(settings, row_len, micro_batch=1)
        memory, time = at.plan(gpu_bytes), plan_time(at, rates, Lengths.full(at.max_prompt_len, at.max_completion_len))
        if time is None:
            raise UserError(
                "a run of a method without a plan of time",
                expected="a teacher's run, whose steps are modelled",
                remedy="choose one of: python test_config_85gb.py --all",
            )
        found.append(Context(row_len=row_len, peak_bytes=memory.max_bytes, fits=memory.fits(), time=time))
    return found


def context_table(found: Sequence[Context], planned: Planned, rates: Rates) -> Table:
    card = format_gb(planned.plan.gpu_bytes or 0)
    table = Table(
        title=f"{planned.name} on {card}, one row at a time in training; predicted ({rates.words})",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
    )
    for column in ("context", "peak GB", "step s", *(f"{phase} s / M tokens" for phase in _SHOWN_PHASES), ""):
        table.add_column(column, justify="right" if column else "left")
    limit = planned.plan.settings.teacher.max_positions
    for at in found:
        remark = "" if at.fits else "does not fit"
        if at.row_len > limit:
            remark += f"{', ' if remark else ''}beyond the model's {limit}"
        costs = [f"{at.seconds_per_million_tokens(phase):.3g}" for phase in _SHOWN_PHASES]
        table.add_row(f"{at.row_len // 1024}k", f"{gb(at.peak_bytes):.1f}", f"{at.time.step_s:.3g}", *costs, remark)
    return table


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="teacher_rlt_mono_85gb")
    parser.add_argument("--gpu-gb", type=float, help="decimal GB of the GPU")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(words)
    name, gpu_bytes = run_config_name(asked.config_name), None if asked.gpu_gb is None else int(asked.gpu_gb * 1e9)
    try:
        planned = plan_config(name, gpu_bytes, asked.overrides)
        settings, card = planned.plan.settings, planned.plan.gpu_bytes or 0
        rates = rates_for_plan(card)
        found = contexts(settings, card, rates)
    except UserError as error:
        console.print(str(error), markup=False)
        return 2
    console.print(context_table(found, planned, rates))
    longest = largest_context(with_row_len(settings, settings.row_len, micro_batch=1), card)
    console.print(
        f"longest context that fits: {longest or 'none'} tokens (predicted; the model's limit is "
        f"{settings.teacher.max_positions}); measured: not measured",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
