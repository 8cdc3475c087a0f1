"""The table of run configurations in README.md, generated: `python -m planner.readme_table [--check]`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.log import console
from core.marked_block import with_block
from core.types import Phase
from core.units import gb
from planner.fit import resolve_auto
from planner.plan import MemoryPlan, plan_run
from schemas.compose import CONFIG_ROOT, compose_run_config, run_config_names
from schemas.run import AnyRunConfig, load_run_config

# GPUs as people call them -> decimal GB that their drivers report.
CARDS_GB = {"80/85": 85.0, "96": 102.0, "141": 150.0}
MEASUREMENTS = CONFIG_ROOT.parent / "docs" / "measurements.json"
"""Figures of GPUs, written by `python -m benchmarks.gpu`."""
START, END = "<!-- table:configs -->", "<!-- /table:configs -->"
_PRECISIONS = {"int8": "8-bit", "nf4": "4-bit", "bf16": "bf16", "fp32": "fp32"}
_SHOWN_PHASES = (Phase.GENERATE, Phase.SCORE, Phase.TRAIN)


def table(measurements: Path = MEASUREMENTS) -> str:
    """Markdown: one row per configuration, one column per GPU with the predicted GB of GENERATE / SCORE / TRAIN."""
    measured = measured_peaks(json.loads(measurements.read_text(encoding="utf-8")))
    header = ["config", "GPU", "teacher", "student", "reference", "batch", "context"]
    header += [*(f"{card} GB GPU" for card in CARDS_GB), "measured"]
    lines = [_row(header), _row(["---"] * len(header))]
    planned_bytes = int(CARDS_GB["80/85"] * 1e9)
    composed = {name: resolve_auto(compose_run_config(name), planned_bytes) for name in run_config_names()}
    configs = {name: load_run_config(values) for name, values in composed.items()}
    for name, config in sorted(configs.items(), key=lambda item: item[1].card_gb):
        lines.append(_row([*_cells(name, config), measured.get(name, "not measured")]))
    phases = " / ".join(phase.value for phase in _SHOWN_PHASES)
    note = (
        "GB; all figures but those of the last column are predicted. GPU: its own, and the peak there. Larger GPUs: "
        f"{phases}, the highest in **bold**; the KV cache grows with the GPU up to what the batch needs. Measured: "
        "the same phases by the driver's count, memory set as for the configuration's own GPU (`make gpu`). "
        "Batch: completions per step, per prompt, per micro-batch. Context: prompt + completion."
    )
    return "\n".join([*lines, "", note])


def measured_peaks(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Run configuration -> measured peaks and the GPU they were measured on; of the latest measurement."""
    cells = {}
    for entry in sorted(entries, key=lambda entry: entry["date"]):
        peaks = entry.get("peaks_gb", {})
        if all(phase.value in peaks for phase in _SHOWN_PHASES):
            shown = " / ".join(f"{peaks[phase.value]:.0f}" for phase in _SHOWN_PHASES)
            cells[entry["config"]] = f"{shown} ({entry['machine']['card']})"
    return cells


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(name: str, config: AnyRunConfig) -> list[str]:
    plans = [plan_run(config, int(card * 1e9)) for card in CARDS_GB.values()]
    settings = plans[0].settings
    own_peak = f"{config.card_gb:.0f} GB: {gb(plan_run(config, int(config.card_gb * 1e9)).max_bytes):.1f}"
    teacher = f"{settings.teacher.short_name}, {_PRECISIONS[settings.precision]}"
    described = settings.described()
    batch = f"{settings.train_batch} / {described.num_generations} / {settings.micro_batch}"
    context = f"{settings.max_prompt_len} + {settings.max_completion_len}"
    return [
        f"`{name}`",
        own_peak,
        teacher,
        described.student,
        described.reference,
        batch,
        context,
        *(_peaks(plan) for plan in plans),
    ]


def _peaks(plan: MemoryPlan) -> str:
    if not plan.fits():
        return "does not fit"
    peaks = {phase: plan.peak_bytes(phase) for phase in _SHOWN_PHASES}
    highest = max(peaks.values())
    return " / ".join(f"**{gb(peak):.0f}**" if peak == highest else f"{gb(peak):.0f}" for peak in peaks.values())


def main(words: list[str] | None = None, readme: Path = CONFIG_ROOT.parent / "README.md") -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where the table is out of date")
    arguments = parser.parse_args(words)
    old = readme.read_text(encoding="utf-8")
    new = with_block(old, table(), start=START, end=END)
    if arguments.check:
        if old != new:
            console.print("README.md: the table is out of date; run python -m planner.readme_table")
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
