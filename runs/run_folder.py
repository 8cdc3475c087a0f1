"""The folder of a run: what it holds, how an unfinished run in it is found again, and how a finished one is kept.

config.yaml        the resolved configuration, defaults included
logs/training.log  what the console says, appended to by a resumed run
metrics.jsonl      one line for each logged step
completions/       completions_STEP.parquet: those of each logged step, with their reward terms
evaluations/       evaluation_STEP.parquet: the held-out ones of each evaluation, likewise
checkpoint-N/      written whole or not at all
adapter_model.safetensors, adapter_config.json, tokenizer files, README.md (model card)    the result
summary.json       before and after; its presence says that the run is finished
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from core.errors import UserError
from core.log import console, log
from runs.files import replaced_file, write_whole
from runs.metrics import METRICS_FILE, drop_metrics_after

CONFIG_FILE, SUMMARY_FILE, STAGING_FOLDER = "config.yaml", "summary.json", ".saving"
COMPLETIONS_FOLDER, EVALUATIONS_FOLDER = "completions", "evaluations"
LOG_FILE, LOCK_FILE = "logs/training.log", ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KEYS_THAT_MAY_DIFFER = {"resume", "card_gb", "gpu_gb", "allow_oversubscription"}


@dataclass(frozen=True)
class RunFolder:
    path: Path
    checkpoint: Path | None
    """Whole checkpoint to continue from; None for a new run."""
    lock: IO[str]
    """Held open for the life of the process: two runs never share a folder."""

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE


def open_run_folder(values: Mapping[str, Any], output_dir: str, resume: str) -> RunFolder:
    """Create or re-open the folder of a run (`resume` as in `schemas.TrainerConfig`).

    With `auto`, an unfinished run of the same configuration is continued from its last checkpoint; any other run that
    lies in the folder is moved to `output_dir.1`, `.2`, ... and nothing is deleted.

    Raises:
        UserError: the folder is in use by another process, cannot be made, or holds something that is no run; or the
            named checkpoint does not exist.
    """
    try:
        return _open(values, _run_path(output_dir), resume)
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def check_output_dir(output_dir: str) -> None:
    """Check that a run can be written there, by a trial beside it that leaves nothing behind.

    Raises:
        UserError: it cannot, or the folder holds something that is no run.
    """
    path = _run_path(output_dir).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".", dir=existing).cleanup()
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def _unwritable(output_dir: str, error: OSError) -> UserError:
    return UserError(
        f"`output_dir` {output_dir!r}: {error.strerror}",
        expected="a folder that can be made and written",
        remedy="output_dir=ANOTHER_FOLDER",
    )


def _run_path(output_dir: str) -> Path:
    path = Path(output_dir).expanduser()
    if path.is_dir() and _content(path) and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"`output_dir` {output_dir!r} holds files, and no {CONFIG_FILE} of a run",
            expected="a new or empty folder, or that of an earlier run",
            remedy="output_dir=ANOTHER_FOLDER",
        )
    return path


def _content(path: Path) -> list[Path]:
    """What lies in a folder, lock and half-written files left out."""
    return [file for file in path.iterdir() if not file.name.startswith(".")]


def _open(values: Mapping[str, Any], path: Path, resume: str) -> RunFolder:
    explicit = Path(resume) if resume not in ("auto", "never") else None
    if explicit is not None and not (explicit / "trainer_state.json").is_file():
        raise UserError(
            f"`resume` {resume!r} holds no checkpoint",
            expected="auto, never, or a checkpoint-N folder with trainer_state.json",
            remedy="resume=auto continues the last unfinished run of this configuration",
        )
    if path.exists() and _content(path):
        _lock(path).close()
        if resume != "never" and (explicit is not None or _is_unfinished_run_of(path, values)):
            checkpoint = explicit or last_checkpoint(path)
            return _reopen(path, values, checkpoint)
        kept = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{i}")).exists())
        path.rename(kept)
        log.info("the earlier run in %s is kept as %s", path, kept)
    path.mkdir(parents=True, exist_ok=True)
    return _reopen(path, values, None)


def _reopen(path: Path, values: Mapping[str, Any], checkpoint: Path | None) -> RunFolder:
    lock = _lock(path)
    console.copy_to(path / LOG_FILE)
    shutil.rmtree(path / STAGING_FOLDER, ignore_errors=True)
    write_whole(path / CONFIG_FILE, yaml.safe_dump(dict(values), sort_keys=True))
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    drop_metrics_after(path / METRICS_FILE, step)
    _drop_tables_after(path, step)
    if checkpoint is not None:
        log.info("continuing %s after step %d", path, step)
    return RunFolder(path, checkpoint, lock)


def _lock(path: Path) -> IO[str]:
    handle = open(path / LOCK_FILE, "a")  # noqa: SIM115 - held for the life of the run
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(
            f"another process is training in {path}",
            expected="one run for each output folder",
            remedy="wait for it, or set output_dir=ANOTHER_FOLDER",
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def _is_unfinished_run_of(path: Path, values: Mapping[str, Any]) -> bool:
    if not (path / CONFIG_FILE).is_file() or (path / SUMMARY_FILE).exists():
        return False
    saved = yaml.safe_load((path / CONFIG_FILE).read_text())
    changed = {k for k in saved.keys() | values.keys() if saved.get(k) != values.get(k)} - _KEYS_THAT_MAY_DIFFER
    if changed:
        log.info("an unfinished run with other settings (%s) lies in %s", ", ".join(sorted(changed)), path)
    return not changed


def last_checkpoint(path: Path) -> Path | None:
    """The last checkpoint after step 0; resuming from step 0 would skip the first evaluation."""
    steps = {int(match[1]): folder for folder in path.iterdir() if (match := _CHECKPOINT.fullmatch(folder.name))}
    whole = [step for step, folder in steps.items() if step and folder.is_dir()]
    return steps[max(whole)] if whole else None


def _drop_tables_after(path: Path, step: int) -> None:
    """Completions and evaluations of steps that the resumed run will make again, and may not log at the same step."""
    for folder in (COMPLETIONS_FOLDER, EVALUATIONS_FOLDER):
        for file in (path / folder).glob("*.parquet"):
            number = re.fullmatch(r"(?:completions|evaluation)_(\d+)", file.stem)
            if number is not None and (not step or int(number[1]) > step):
                file.unlink()


def write_evaluation(path: Path, step: int, table: Mapping[str, list[Any]]) -> None:
    """Write `evaluations/evaluation_STEP.parquet` of the run in `path`, over an earlier one of the step."""
    import pandas as pd  # takes a second: not before the output folder is checked

    folder = path / EVALUATIONS_FOLDER
    folder.mkdir(exist_ok=True)
    with replaced_file(folder / f"evaluation_{step:05d}.parquet") as partial:
        pd.DataFrame(table).to_parquet(partial)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    write_whole(path / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def publish_checkpoint(staged: Path, target: Path) -> None:
    """Make a checkpoint that was written to a staging folder appear under its final name in one step."""
    for file in staged.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
