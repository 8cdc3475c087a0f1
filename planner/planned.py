"""A run configuration and its memory plan on one GPU, as a result that shows itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from core.gpu import find_gpu
from core.shown import Shown
from core.units import format_gb
from planner.constants import MAX_CPU_AUTO_BYTES
from planner.fit import own_card_bytes, resolve_auto, why_not
from planner.plan import MemoryPlan, plan_run
from planner.rates import Rates, rates_for_memory, rates_of_gpu, saved_cpu_rates
from planner.report import plan_table, summary_lines
from planner.time import Lengths, TimePlan, plan_time, time_table
from schemas.compose import compose_run_config
from schemas.run import AnyRunConfig, load_run_config


@dataclass(frozen=True, kw_only=True, repr=False)
class Planned(Shown):
    """One configuration on one GPU; every figure is predicted."""

    name: str
    values: dict[str, Any]
    """As composed, with `auto` resolved for the GPU."""
    config: AnyRunConfig
    plan: MemoryPlan

    @property
    def fits(self) -> bool:
        """Whether every phase stays within 97 % of the GPU."""
        return self.plan.fits()

    def tables(self) -> list[RenderableType]:
        return [*self.what_is_planned(), self.verdict()]

    def what_is_planned(self) -> list[RenderableType]:
        """Models and batch in a line, the phases as a table, cache and host memory in words."""
        plan, described = self.plan, self.plan.settings.described()
        title = f"{self.name} on {format_gb(plan.gpu_bytes or 0)}, predicted"
        return [
            f"{described.models}; {described.rows}; context {plan.settings.row_len}",
            plan_table(plan, title=title),
            *(f"  {line}" for line in summary_lines(plan)),
            *self.time_shown(),
        ]

    def time_plans(self, rates: Rates) -> list[TimePlan]:
        """For the lengths that are expected, and for rows as long as allowed; empty: the method has no such plan."""
        settings = self.plan.settings
        limits = settings.max_prompt_len, settings.max_completion_len
        plans = (plan_time(settings, rates, lengths(*limits)) for lengths in (Lengths.expected, Lengths.full))
        return [plan for plan in plans if plan is not None]

    def time_shown(self) -> list[RenderableType]:
        """On the GPU of the plan, and on this machine's CPU where the run would fall back to it."""
        plans = self.time_plans(rates_for_plan(self.plan.gpu_bytes or 0))
        if not plans:
            return []
        shown: list[RenderableType] = [_time_table(plans)]
        if find_gpu() is None and self.plan.max_bytes <= MAX_CPU_AUTO_BYTES:
            cpu = saved_cpu_rates()
            not_measured = "  time on this CPU: python -m optimization.rates measures what the plan needs, in seconds"
            shown.append(not_measured if cpu is None else _time_table(self.time_plans(cpu)))
        return [*shown, f"  {plans[0].lengths.source}; or every row as long as allowed"]

    def verdict(self) -> str:
        card = format_gb(self.plan.gpu_bytes or 0)
        if not self.fits:
            return f"{self.name} does not fit a GPU of {card}: {why_not(self.plan)}"
        peak = format_gb(self.plan.max_bytes)
        return f"{self.name} peaks at {peak} ({self.plan.binding_phase}) on a GPU of {card}"


def plan_config(name: str, gpu_bytes: int | None, words: Sequence[str] = ()) -> Planned:
    """Compose, validate and plan; `words` are settings as on the command line.

    Without `gpu_bytes` the GPU is `gpu_gb` of the configuration, the GPU that is here, or `card_gb` of the
    configuration.

    Raises:
        HydraException, OmegaConfBaseException, ConfigError, UserError: it does not compose, validate, or name a model
            whose shape is known here.
    """
    values = compose_run_config(name, words)
    return _plan(name, values, _card_bytes(values) if gpu_bytes is None else gpu_bytes)


def plan_on_own_card(name: str) -> Planned:
    """Compose, validate and plan for the GPU that the run configuration is for, whatever GPU is here.

    Raises:
        HydraException, OmegaConfBaseException, ConfigError, UserError: as `plan_config`.
    """
    values = compose_run_config(name)
    return _plan(name, values, own_card_bytes(values))


def _time_table(plans: Sequence[TimePlan]) -> Table:
    return time_table(plans, title=f"time on {plans[0].rates.words}; predicted")


def rates_for_plan(gpu_bytes: int) -> Rates:
    """Of the GPU that is here where the plan is for it and the table knows it, else of one with as much memory."""
    gpu = find_gpu()
    here = rates_of_gpu(gpu.name) if gpu is not None and gpu.total_bytes == gpu_bytes else None
    return here or rates_for_memory(gpu_bytes)


def _plan(name: str, values: dict[str, Any], gpu_bytes: int) -> Planned:
    values = resolve_auto(values, gpu_bytes)
    config = load_run_config(values)
    return Planned(name=name, values=values, config=config, plan=plan_run(config, gpu_bytes))


def _card_bytes(values: dict[str, Any]) -> int:
    if isinstance(gpu_gb := values.get("gpu_gb"), int | float):
        return int(gpu_gb * 1e9)
    gpu = find_gpu()
    return gpu.total_bytes if gpu is not None else own_card_bytes(values)
