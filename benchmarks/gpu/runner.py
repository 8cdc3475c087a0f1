"""Runner of measurement cells: each in its own process, limited in time, its result kept as JSON.

Of a cell `OUT` holds `PART-CELL.json` (its result) and `PART-CELL.log` (what it printed). A cell with an `ok` result of
the same machine, sources and shape is not run again. A cell that fails, or runs out of time, stops no other.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.machine import ROOT, Machine
from core.log import log
from runs.files import write_whole

Status = Literal["ok", "skipped", "failed", "out of time"]
SKIPPED_STATUS = 77
"""Exit status of a cell that has nothing to measure here; its figures say why."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",  # else a C++ helper is compiled at the first import of xgrammar
    "VLLM_LOGGING_LEVEL": "INFO",  # the log is where to see which kernels were chosen
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement, made by a process of its own."""

    part: str
    name: str
    function: str
    """`package.module:function`, called with (setup, figures)."""
    expected_s: int
    """Not started where less than this is left of the part's time, unless it is the first."""
    arguments: Mapping[str, Any]

    @property
    def file_name(self) -> str:
        return f"{self.part}-{self.name}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a cell."""

    part: str
    cell: str
    shape: str
    status: Status
    reason: str
    """Why it was skipped or failed; empty where it is ok."""
    seconds: float
    date: str
    command: str
    machine: dict[str, Any]
    figures: dict[str, Any]
    """`tables` (title, columns, rows) for people, the rest for programs. Of a failed cell: what it had so far."""


class Figures:
    """Figures of a cell so far; every update is written at once, so that a killed cell leaves them behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {"tables": []}

    def update(self, **values: Any) -> None:
        self._values |= values
        write_whole(self._path, json.dumps(self._values, indent=1) + "\n")

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
        self.update(tables=[*(t for t in self._values["tables"] if t["title"] != title), table])


def read_result(out: Path, cell: Cell) -> Result | None:
    """Result of a cell in `OUT`, of whatever machine; None where there is no complete one."""
    try:
        return Result(**json.loads((out / f"{cell.file_name}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):  # never ran, or by an earlier version of this file
        return None


def run_cells(
    cells: Sequence[Cell], machine: Machine, *, shape: str, out: Path, limit_s: float, again: bool
) -> Iterator[Result]:
    """Run the cells of one part; returns their results, earlier ones included. Stops when the part's time is over."""
    started = time.monotonic()
    ran_one = False
    for cell in cells:
        known = read_result(out, cell)
        if known is not None and not again and _holds(known, machine, shape):
            log.info("%s: there is a result of %s", cell.file_name, known.date)
            yield known
            continue
        left_s = limit_s - (time.monotonic() - started)
        if ran_one and left_s < cell.expected_s:
            log.info(
                "%s: %.0f s of this part's time are left, it takes about %d", cell.file_name, left_s, cell.expected_s
            )
            continue
        ran_one = True
        yield run_cell(cell, machine, shape=shape, out=out, limit_s=left_s)


def _holds(known: Result, machine: Machine, shape: str) -> bool:
    """The sources decide, not the commit: committing the figures themselves changes nothing that was measured."""
    here = machine.to_dict() | {"commit": known.machine.get("commit")}
    return known.status == "ok" and known.machine == here and known.shape == shape


def run_cell(cell: Cell, machine: Machine, *, shape: str, out: Path, limit_s: float) -> Result:
    """Run a cell in a fresh process, end it after `limit_s`, write its result."""
    out.mkdir(parents=True, exist_ok=True)
    log_file, figures_file = out / f"{cell.file_name}.log", out / f"{cell.file_name}.figures"
    figures_file.unlink(missing_ok=True)
    task = {"cell": asdict(cell) | {"arguments": dict(cell.arguments)}, "shape": shape, "out": str(out)}
    command = [sys.executable, "-m", "benchmarks.gpu.cell", json.dumps(task)]
    log.info("%s: at work, at most %.0f s; %s", cell.file_name, limit_s, log_file)
    started = time.monotonic()
    with open(log_file, "w", encoding="utf-8") as lines:
        status = _run(command, lines, limit_s)
    figures = json.loads(figures_file.read_text(encoding="utf-8")) if figures_file.exists() else {}
    figures_file.unlink(missing_ok=True)
    result = Result(
        part=cell.part,
        cell=cell.name,
        shape=shape,
        status={0: "ok", SKIPPED_STATUS: "skipped", None: "out of time"}.get(status, "failed"),  # type: ignore[arg-type]
        reason=_reason(status, figures, log_file, limit_s),
        seconds=round(time.monotonic() - started, 1),
        date=datetime.date.today().isoformat(),
        command=f"python -m benchmarks.gpu --part {cell.part} --shape {shape}",
        machine=machine.to_dict(),
        figures=figures,
    )
    write_whole(out / f"{cell.file_name}.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


def _run(command: list[str], lines: Any, limit_s: float) -> int | None:
    """Exit status; None where the time was over. A process of the cell does not outlive it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=lines, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """That of this process; one GPU is to be seen, the first that is visible, numbered as nvidia-smi does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return _QUIET | dict(os.environ) | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def _reason(status: int | None, figures: Mapping[str, Any], log_file: Path, limit_s: float) -> str:
    if status == 0:
        return ""
    if status == SKIPPED_STATUS:
        return str(figures["skipped"])
    lines = [
        line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    last = lines[-1][:300] if lines else "it printed nothing"
    return f"after {limit_s:.0f} s, at: {last}" if status is None else f"status {status}: {last}"
