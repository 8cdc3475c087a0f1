"""The page: one payload as JSON and the files of `page/` around it, one HTML file that asks no host for anything."""

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

from runs.files import write_whole
from runs.report.facts import (
    environment_of,
    figures_of,
    flat_config,
    log_of,
    memory_of,
    optimizations_of,
    seconds_of,
    shipped_differences,
)
from runs.report.panels import panels_of
from runs.report.read import RunData, read_run
from runs.report.samples import rounded, samples_of
from runs.report.verdict import verdict_of

REPORT_FILE = "report.html"
_PARTS = Path(__file__).parent / "page"
_STYLES = ("uPlot.min.css", "report.css")
_SCRIPTS = ("uPlot.iife.min.js", "dom.js", "charts.js", "samples.js", "report.js")
_MAX_SAMPLE_BYTES, _MAX_SERIES_BYTES = 3_000_000, 1_200_000
_BYTES_A_POINT = 10
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run (into its folder, unless said otherwise) or of several (`report.html` here).

    Raises:
        UserError: a folder holds no run.
    """
    runs = [read_run(path) for path in run_dirs]
    if output is None:
        output = run_dirs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE)
    write_whole(output, report_html(payload_of(runs)))
    return output


def payload_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """Everything that the page shows."""
    keys = {key for run in runs for key in run.series}
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "panels": panels_of(keys),
        "runs": [
            _run_payload(run, name, len(runs)) for run, name in zip(runs, _distinct_names(runs), strict=True)
        ],
    }  # fmt: skip


def _distinct_names(runs: Sequence[RunData]) -> list[str]:
    """Folder names, with as many folders before them as tell the runs apart."""
    paths = [run.path.parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({i})" for i, run in enumerate(runs, start=1)]


def _run_payload(run: RunData, name: str, num_runs: int) -> dict[str, Any]:
    config = run.config
    max_steps = config.get("max_steps")
    payload = {
        "name": name,
        "folder": str(run.path),
        "method": str(config.get("method", "unknown")),
        "model": str(config.get("model_name_or_path") or "new model"),
        "student": str(config.get("student_model") or "") if config.get("method") == "rlt" else "",
        "step": run.last_step,
        "max_steps": max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        "finished": run.is_finished,
        "verdict": asdict(verdict_of(run)),
        "figures": figures_of(run),
        "seconds": seconds_of(run),
        "memory": memory_of(run),
        "config": flat_config(config),
        "shipped": shipped_differences(run),
        "optimizations": optimizations_of(run),
        "environment": environment_of(run),
        "log": log_of(run),
        "samples": samples_of(run, _MAX_SAMPLE_BYTES // num_runs),
        **_curves(run, _MAX_SERIES_BYTES // num_runs),
    }
    return payload | {"missing": run.missing}  # reading the tables may have added to it


def _curves(run: RunData, max_bytes: int) -> dict[str, Any]:
    """Series by key: `[index of its steps, values]`; every n-th value, and the last, where all would take too much."""
    num_values = sum(map(len, run.series.values()))
    stride = max(1, -(-num_values * _BYTES_A_POINT // max_bytes))
    axes: list[list[int]] = []
    series = {}
    for key, values in run.series.items():
        points = list(values.items())
        kept = points if stride == 1 or len(points) <= 2 else [*points[:-1:stride], points[-1]]
        steps = [step for step, _ in kept]
        if steps not in axes:
            axes.append(steps)
        series[key] = [axes.index(steps), [rounded(value, 6) for _, value in kept]]
    return {"axes": axes, "series": series, "stride": stride}


def report_html(payload: dict[str, Any]) -> str:
    """The whole page. Scripts and styles are allowed by their hashes; nothing else runs, and nothing is loaded."""
    style = "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _STYLES)
    script = "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    allowed = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    return Template((_PARTS / "report.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; {allowed}; base-uri 'none'",
        style=style,
        script=script,
        payload=as_script_data(payload),
    )


def as_script_data(payload: Any) -> str:
    """JSON that no text in it can end or leave: what HTML could read as markup is escaped, lone surrogates too."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
