"""Reading a run's folder as it is: unfinished, torn or incomplete. What is missing is said, and never raised."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError
from runs.metrics import METRICS_FILE
from runs.run_folder import (
    COMPLETIONS_FOLDER,
    CONFIG_FILE,
    EVALUATIONS_FOLDER,
    LOG_FILE,
    SUMMARY_FILE,
    TOKEN_SCORES_FOLDER,
)

_STEP_OF_TABLE = re.compile(r"(?:completions|evaluation)_(\d+)")
_MAX_LOG_BYTES = 1_000_000
_REPEATED_COLUMNS = ("prompt", "completion")

KIND_PREFIX = "eval_share/"
Series = dict[int, float]
"""Step -> value."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What lies in a run's folder."""

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    """Of the metrics file, whole lines only."""
    summary: dict[str, Any] | None
    log_lines: list[str]
    completions: dict[int, Path]
    """Step -> table."""
    evaluations: dict[int, Path]
    missing: list[str] = field(default_factory=list)
    """What could not be read, in words; grows as tables are read."""

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def series(self) -> dict[str, Series]:
        """Every logged number by its key; a step that was made again after a roll-back has its last value.

        A kind of explanation that an evaluation does not name has the share 0 there.
        """
        series: dict[str, Series] = {}
        for line in self.lines:
            for key, value in line.items():
                if key not in ("step", "epoch") and _is_number(value):
                    series.setdefault(key, {})[line["step"]] = float(value)
        shares = [values for key, values in series.items() if key.startswith(KIND_PREFIX)]
        for step in {step for values in shares for step in values}:
            for values in shares:
                values.setdefault(step, 0.0)
        return {key: dict(sorted(values.items())) for key, values in series.items()}

    @cached_property
    def num_not_finite(self) -> dict[str, int]:
        """Key -> number of logged values that are NaN or infinite."""
        found: dict[str, int] = {}
        for line in self.lines:
            for key, value in line.items():
                if isinstance(value, float) and not isfinite(value):
                    found[key] = found.get(key, 0) + 1
        return found

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def is_finished(self) -> bool:
        return self.summary is not None

    def table(self, file: Path, wanted: set[str] | None = None) -> dict[str, list[Any]] | None:
        """Columns of a Parquet file, None where it cannot be read, which is noted.

        Args:
            wanted: of which those that it has; without it all but prompts and whole completions, which repeat the rest.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                names = [
                    name
                    for name in parquet.schema_arrow.names
                    if (name in wanted if wanted is not None else name not in _REPEATED_COLUMNS)
                ]
                return dict(parquet.read(columns=names).to_pydict())
        except (OSError, pyarrow.ArrowException) as error:
            self.missing.append(f"{file.relative_to(self.path)} could not be read: {_first_line(error)}")
            return None

    def token_scores(self, table: Path) -> dict[int, dict[str, Any]]:
        """Row of the table -> its scores token by token, for the rows that have them."""
        file = self.path / TOKEN_SCORES_FOLDER / table.name
        columns = self.table(file) if file.exists() else None
        if not columns or "row" not in columns:
            return {}
        return {row: {name: values[i] for name, values in columns.items()} for i, row in enumerate(columns["row"])}


def read_run(path: Path) -> RunData:
    """Read everything of a run but its tables, which are read when they are asked for.

    Raises:
        UserError: there is no run.
    """
    path = path.expanduser().absolute()
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{str(path)!r} holds no {CONFIG_FILE}",
            expected="the output folder of a run",
            remedy="name a folder such as results/teacher_rlt_tiny",
        )
    missing: list[str] = []
    run = RunData(
        path=path,
        config=_config(path / CONFIG_FILE, missing),
        lines=list(_metrics(path / METRICS_FILE, missing)),
        summary=_json(path / SUMMARY_FILE, missing),
        log_lines=_log(path / LOG_FILE, missing),
        completions=_tables(path / COMPLETIONS_FOLDER),
        evaluations=_tables(path / EVALUATIONS_FOLDER),
        missing=missing,
    )
    if run.summary is None and not any(SUMMARY_FILE in text for text in missing):
        missing.append(f"no {SUMMARY_FILE}: the run has not ended")
    if run.config.get("method") == "rlt":
        for tables, folder in ((run.completions, COMPLETIONS_FOLDER), (run.evaluations, EVALUATIONS_FOLDER)):
            if not tables:
                missing.append(f"no table in {folder}/")
    return run


def _config(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        missing.append(f"{file.name} could not be read: {_first_line(error)}")
        return {}
    return values if isinstance(values, dict) else {}


def _metrics(file: Path, missing: list[str]) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        missing.append(f"no {file.name}: no step was logged")
        return
    num_bad = 0
    with open(file, encoding="utf-8", errors="replace") as handle:
        for text in handle:
            try:
                line = json.loads(text)
                is_good = isinstance(line, dict) and isinstance(line.get("step"), int)
            except ValueError:
                is_good = False
            if is_good:
                yield line
            num_bad += not is_good
    if num_bad:
        missing.append(f"{file.name}: {num_bad} torn {'line' if num_bad == 1 else 'lines'} left out")


def _json(file: Path, missing: list[str]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        missing.append(f"{file.name} could not be read: {_first_line(error)}")
        return None
    return values if isinstance(values, dict) else None


def _log(file: Path, missing: list[str]) -> list[str]:
    """The end of the log, for its warnings and the table of optimizations."""
    if not file.is_file():
        missing.append(f"no {LOG_FILE}")
        return []
    with open(file, "rb") as handle:
        handle.seek(max(0, file.stat().st_size - _MAX_LOG_BYTES))
        return handle.read().decode("utf-8", errors="replace").splitlines()


def _tables(folder: Path) -> dict[int, Path]:
    found = {}
    for file in folder.glob("*.parquet") if folder.is_dir() else ():
        if match := _STEP_OF_TABLE.fullmatch(file.stem):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
