"""Facts about a run beside its curves: figures before and after, memory, configuration, optimizations, environment."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from statistics import mean
from typing import Any

from core.types import Phase
from runs.report.read import KIND_PREFIX, RunData
from runs.report.samples import rounded
from runs.run_folder import LOG_FILE
from runs.summary import TEACHER_REPORT, Report
from schemas.compose import compose_run_config, run_config_names
from schemas.methods import METHODS
from schemas.optimization import TrainingOptimizationConfig
from schemas.run import load_run_config, resolved_values

_MAX_LOG_LINES = 40
_MAX_VALUE_CHARS = 500
_NAMES_OF_THE_RUN = {"output_dir", "run_name", "resume", "logging_dir"}
_WINDOW = 5
_MORE_FIGURES = {
    "rlt/unprocessed_thought_kl_mean": "KL of the explanation, nats per token",
    "entropy": "entropy of the policy, nats per token",
    "completions/mean_length": "tokens per completion",
    "completions/clipped_ratio": "share of completions cut off",
    "grad_norm": "gradient norm",
    "sampling/logp_difference": "generator against trainer, nats per token",
    "step_time": "seconds per step, without evaluation",
    "tokens_per_s/generate": "tokens per second, generate",
    "tokens_per_s/train": "tokens per second, train",
}


def figures_of(run: RunData) -> list[dict[str, Any]]:
    """Before and after: held-out figures of the first and last evaluation, others as means of five logged steps."""
    report = _report_of(run)
    shares = sorted(key for key in run.series if key.startswith(KIND_PREFIX))
    names = {
        **report.eval_rows,
        report.train_key: report.train_name,
        **{key: f"explanations: {key.removeprefix(KIND_PREFIX)}" for key in shares},
        **_MORE_FIGURES,
    }
    figures = []
    for key, name in names.items():
        values = list(run.series.get(key, {}).values())
        if not values:
            continue
        window = 1 if key.startswith("eval_") else min(_WINDOW, max(1, len(values) // 2))
        before, after = mean(values[:window]), mean(values[-window:])
        if key.startswith("eval_") and len(values) == 1:
            before = None  # type: ignore[assignment]
        figures.append({"key": key, "name": name, "before": rounded(before, 6), "after": rounded(after, 6)})
    return figures


def _report_of(run: RunData) -> Report:
    method = METHODS.get(str(run.config.get("method")))
    return method.report.object if method is not None else TEACHER_REPORT


def seconds_of(run: RunData) -> dict[str, float]:
    """Phase -> logged seconds of the whole run."""
    phases = {phase: sum(run.series.get(f"time/{phase}_s", {}).values()) for phase in Phase}
    return {str(phase): round(seconds, 3) for phase, seconds in phases.items() if seconds}


def memory_of(run: RunData) -> list[dict[str, Any]]:
    """Peak GB of each phase: predicted, measured (reserved on the GPU, or the process's RSS) and the driver's count."""
    found = []
    for phase in Phase:
        peaks = {
            kind: max(series.values())
            for kind in ("predicted", "reserved", "rss", "driver")
            if (series := run.series.get(f"memory/{phase}_{kind}_gb"))
        }
        if peaks:
            found.append({"phase": str(phase), **{kind: rounded(peak, 5) for kind, peak in peaks.items()}})
    return found


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _shown(value)
    return dict(sorted(flat.items()))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]} [...]"


def shipped_differences(run: RunData) -> dict[str, Any] | None:
    """What differs from the shipped configuration that the run is named after; None where there is none."""
    name = run.config.get("run_name")
    if name not in run_config_names():
        return None
    composed = compose_run_config(str(name))
    shipped, here = flat_config(resolved_values(load_run_config(composed), composed)), flat_config(run.config)
    keys = sorted(key for key in shipped.keys() | here.keys() if shipped.get(key) != here.get(key))
    rows = [[key, shipped.get(key, "not set"), here.get(key, "not set")] for key in keys]
    return {"name": name, "rows": [row for row in rows if row[0] not in _NAMES_OF_THE_RUN]}


def optimizations_of(run: RunData) -> dict[str, Any]:
    """Settings that ask for optimizations, and the tables that the log has of what they did."""
    asked = {field.name: run.config.get(field.name) for field in fields(TrainingOptimizationConfig)}
    defaults = {field.name: field.default for field in fields(TrainingOptimizationConfig)}
    settings = [[name, _shown(value)] for name, value in asked.items() if value is not None and value != defaults[name]]
    return {"settings": settings, "tables": list(_log_tables(run.log_lines, "optimizations"))}


def _log_tables(lines: list[str], title: str) -> Iterator[str]:
    """Tables under a title, as the log has them."""
    for i, line in enumerate(lines):
        if line.startswith(title) and i + 1 < len(lines) and lines[i + 1].startswith("┏"):
            end = next((k for k in range(i, len(lines)) if lines[k].startswith("└")), i)
            yield "\n".join(line.rstrip() for line in lines[i : end + 1])


def log_of(run: RunData) -> dict[str, list[str]]:
    """Warnings and errors of the log, and its end."""
    alarming = [line.strip() for line in run.log_lines if re.search(r"\b(WARNING|ERROR|Traceback)\b|^\w*Error\b", line)]
    return {"warnings": alarming[-_MAX_LOG_LINES:], "tail": run.log_lines[-_MAX_LOG_LINES:], "file": [LOG_FILE]}


def environment_of(run: RunData) -> list[list[str]]:
    """Models and generator as the log names them, versions as the model card has them."""
    said = {}
    for line in run.log_lines:
        text = line.partition("INFO")[2].strip()
        if text.startswith("generator: "):
            said["generator"] = text.removeprefix("generator: ")
        elif re.search(r" on (cpu|cuda)\b", text):
            said["models"] = text
    card = run.path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    versions = text.partition("## Versions\n\n")[2].partition("\n")[0]
    return [*map(list, said.items()), *(list(entry.split(" ", 1)) for entry in versions.split(", ") if " " in entry)]
