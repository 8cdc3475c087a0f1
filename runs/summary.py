"""Summary of a run: before and after, from its metrics file, as a table and as `summary.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Protocol

from rich.console import RenderableType
from rich.table import Table

from core.shown import Shown
from core.types import Phase
from core.units import gb
from planner.plan import MemoryPlan
from runs.metrics import METRICS_FILE, read_metrics
from runs.run_folder import write_summary

_WINDOW = 5


@dataclass(frozen=True)
class Report:
    """Content of the table at the end of a run."""

    train_key: str
    train_name: str
    eval_rows: Mapping[str, str]
    has_page: ClassVar[bool] = True

    def tables(self, summary: dict[str, Any]) -> list[RenderableType]:
        times = [time_table(summary["time"])] if "time" in summary else []
        return [summary_table(summary, self), memory_table(summary), *times]


class ShownResult(Protocol):
    """How a run's summary is shown at its end: a `Report`, or that of a method without training."""

    has_page: ClassVar[bool]
    """Whether the run has a history of steps, of which `runs.report` makes a page."""

    def tables(self, summary: dict[str, Any]) -> list[RenderableType]: ...


TEACHER_REPORT = Report(
    "reward",
    "reward (first and last steps)",
    {
        "eval_solution_log_prob": "held-out solution log-prob per token (nats)",
        "eval_reward": "held-out reward",
        "eval_format_rate": "format rate",
        "eval_explanation_tokens": "tokens per explanation",
    },
)
DIFFUSION_REPORT = Report(
    "loss",
    "training loss (first and last steps)",
    {
        "eval_nll_bound": "held-out bound of the negative log-likelihood a token (nats)",
        "eval_exact_match": "held-out exact match",
    },
)
SFT_REPORT = Report(
    "loss",
    "training loss (first and last steps)",
    {"eval_loss": "held-out negative log-likelihood a learned token (nats)"},
)


@dataclass(frozen=True, kw_only=True, repr=False)
class FinishedRun(Shown):
    """A run that came to its end."""

    folder: Path
    """Where it lies: what the run made, `config.yaml`, logs."""
    summary: dict[str, Any]
    """What `summary.json` holds: `steps`, before and after of each figure, memory."""
    report: ShownResult = TEACHER_REPORT

    def tables(self) -> list[RenderableType]:
        return self.report.tables(self.summary)


class PhasePeak(Protocol):
    """Measured peak memory of a phase, bytes."""

    @property
    def peak_reserved_bytes(self) -> int: ...

    @property
    def peak_driver_bytes(self) -> int: ...


class Meter(Protocol):
    """Protocol of `models.meter.PhaseMeter`, which needs torch."""

    @property
    def device(self) -> Any: ...

    def checkpoint_use(self) -> Mapping[Phase, PhasePeak]: ...


def memory_by_phase(plan: MemoryPlan, meter: Meter) -> dict[str, Any]:
    """Predicted and measured peak of each phase in decimal GB; on a CPU the measured one is the process's RSS.

    `driver_gb`: what the driver reported as used on the GPU, CUDA's context and other processes included.
    """
    return {
        "measured": "reserved on the GPU" if meter.device.type == "cuda" else "RSS of the process (no GPU)",
        "phases": {
            str(phase): {"predicted_gb": gb(plan.peak_bytes(phase)), "measured_gb": gb(use.peak_reserved_bytes)}
            | ({"driver_gb": gb(use.peak_driver_bytes)} if use.peak_driver_bytes else {})
            for phase, use in meter.checkpoint_use().items()
            if use.peak_reserved_bytes
        },
    }


def summarise(
    run_dir: Path, memory: dict[str, Any], report: Report = TEACHER_REPORT, seconds: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read `metrics.jsonl`, write `summary.json`, return it.

    Training figures are means of the first and the last five logged steps (fewer in a short run); held-out ones are
    those of the first and the last evaluation. `seconds`: of a step by phase, planned and measured.
    """
    lines = read_metrics(run_dir / METRICS_FILE)
    logged = _values(lines, report.train_key)
    differences = _values(lines, "sampling/logp_difference")
    window = min(_WINDOW, max(1, len(logged) // 2))
    evaluations = [line for line in lines if any(key in line for key in report.eval_rows)]
    summary: dict[str, Any] = {
        "steps": max((line["step"] for line in lines), default=0),
        report.train_key: {"before": mean(logged[:window]), "after": mean(logged[-window:])} if logged else None,
        "logp_difference": mean(differences) if differences else None,
    }
    if evaluations:
        keys = [k for k in report.eval_rows if k in evaluations[0]]
        kinds = {k for line in (evaluations[0], evaluations[-1]) for k in line if k.startswith("eval_share/")}
        for key in [*keys, *sorted(kinds)]:
            summary[key] = {"before": evaluations[0].get(key, 0.0), "after": evaluations[-1].get(key, 0.0)}
    summary["memory"] = {**memory, "phases": _peaks(memory, lines)}
    if seconds:
        summary["time"] = seconds
    write_summary(run_dir, summary)
    return summary


def _peaks(memory: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Peak of each phase over all processes of the run: this one's measurements, and what the others have logged."""
    kind = "reserved" if memory.get("measured", "").startswith("reserved") else "rss"
    found: dict[str, dict[str, float]] = {}
    for phase in Phase:
        own = memory.get("phases", {}).get(str(phase), {})
        for key, name in (("predicted_gb", "predicted"), ("measured_gb", kind), ("driver_gb", "driver")):
            values = _values(lines, f"memory/{phase}_{name}_gb") + _values([own], key)
            if values:
                found.setdefault(str(phase), {})[key] = max(values)
    return found


def _values(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Of the lines that have one: a figure is null where nothing counted, as in a step of masked completions only."""
    return [line[key] for line in lines if line.get(key) is not None]


def summary_table(summary: dict[str, Any], report: Report = TEACHER_REPORT) -> Table:
    table = Table(title=f"after {summary['steps']} steps", title_justify="left", caption_justify="left")
    if summary["logp_difference"] is not None:
        table.caption = f"generator and trainer: {summary['logp_difference']:.4f} nats per token apart"
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    names = {report.train_key: report.train_name, **report.eval_rows}
    for key, value in summary.items():
        if isinstance(value, dict) and "before" in value:
            name = names.get(key, key.replace("eval_share/", "explanations: "))
            before, after = value["before"], value["after"]
            table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def memory_table(summary: dict[str, Any]) -> Table:
    memory = summary["memory"]
    table = Table(title="peak memory, GB", title_justify="left")
    columns = {
        "predicted_gb": "predicted for a GPU",
        "measured_gb": memory["measured"],
        "driver_gb": "used on the GPU",
    }
    shown = [key for key in columns if any(key in peak for peak in memory["phases"].values())]
    for column in ("phase", *(columns[key] for key in shown)):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, peak in memory["phases"].items():
        table.add_row(phase, *(f"{peak[key]:.2f}" for key in shown))
    return table


def time_table(seconds: dict[str, Any]) -> Table:
    """Seconds of a step: as planned for the lengths that came, and measured."""
    table = Table(title="seconds a step", title_justify="left", caption_justify="left")
    table.caption = f"{seconds['lengths']}; {seconds['tokens_per_s']:.0f} completion tokens/s; {seconds['rates']}"
    for column in ("phase", "planned", "share", "measured", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    phases = seconds["phases"]
    totals = {key: sum(phase[key] for phase in phases.values()) for key in ("planned_s", "measured_s")}
    for name, phase in [*phases.items(), ("step", totals)]:
        cells = [text for key in totals for text in (f"{phase[key]:.3g}", f"{phase[key] / totals[key]:.0%}")]
        table.add_row(name, *cells)
    return table
