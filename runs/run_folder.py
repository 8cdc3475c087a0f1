"""The folder of a run: what it holds, how an unfinished run in it is found again, and how any other is kept.

config.yaml        the resolved configuration, defaults included
logs/training.log  what the console says, appended to by a resumed run
metrics.jsonl      one line for each logged step
completions/       completions_STEP.parquet: those of each logged step, with their reward terms
evaluations/       evaluation_STEP.parquet: the held-out ones of each evaluation, likewise
token_scores/      tables of the same names: log-probs and KL token by token, of a sample of their rows
checkpoint-N/      written whole or not at all, with a manifest (runs/checkpoints.py)
adapter_model.safetensors, adapter_config.json, tokenizer files, README.md (model card)    the result
summary.json       before and after; its presence says that the run is finished

A run is never cut for another one: what lies in the folder and is not continued is kept whole as `FOLDER.1`, `.2`, ...
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from core.errors import UserError
from core.locks import try_lock
from core.log import console, log
from runs.checkpoints import (
    check_named,
    check_whole,
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    copy_checkpoint,
    first_whole,
    set_aside_newer,
)
from runs.files import free_name, replaced_file, write_whole
from runs.metrics import METRICS_FILE, drop_metrics_after

CONFIG_FILE, SUMMARY_FILE, STAGING_FOLDER = "config.yaml", "summary.json", ".saving"
COMPLETIONS_FOLDER, EVALUATIONS_FOLDER, TOKEN_SCORES_FOLDER = "completions", "evaluations", "token_scores"
LOG_FILE, LOCK_FILE = "logs/training.log", ".lock"
_HISTORY = (METRICS_FILE, COMPLETIONS_FOLDER, EVALUATIONS_FOLDER, TOKEN_SCORES_FOLDER, "logs")
_KEYS_THAT_MAY_DIFFER = {"resume", "output_dir", "card_gb", "gpu_gb", "allow_oversubscription"}
_FIXED_BY_A_CHECKPOINT = (
    {"method", "model_name_or_path", "new_model", "tokenizer_name_or_path", "trainable_weights", "sync_ref_model"}
    | {f"model_args.lora_{name}" for name in ("r", "alpha", "dropout", "target_modules")}
    | {f"model_args.{name}" for name in ("load_in_8bit", "load_in_4bit", "adapter_path")}
    | {"optim", "optim_args", "optim_target_modules", "use_muon"}
    | {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
)
"""What was trained, and by which optimizer: its tensors and their settings are those of the checkpoint."""


@dataclass(frozen=True)
class RunFolder:
    path: Path
    """Absolute, without links: it stays the same folder whatever the current one is."""
    checkpoint: Path | None
    """Whole checkpoint to continue from; None for a new run."""
    lock: IO[str]
    """Held open for the life of the process: two runs never share a folder."""

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE


def open_run_folder(values: Mapping[str, Any], output_dir: str, resume: str) -> RunFolder:
    """Create or re-open the folder of a run (`resume` as in `schemas.trainer.MachineConfig`).

    `auto` continues an unfinished run of the same configuration in place, from its newest whole checkpoint. A run that
    begins at a named checkpoint gets a copy of it, and the history up to it where it is one of this folder. The same
    call continues that run too. What else lies in the folder is moved to `output_dir.1`, `.2`, ...; nothing is deleted.

    Raises:
        UserError: the folder is in use by another process, cannot be made, or holds something that is no run; or there
            is no whole checkpoint to continue from, or the named one is that of another model or optimizer.
    """
    try:
        return _open(values, _run_path(output_dir), resume)
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def check_output_dir(output_dir: str, resume: str = "auto") -> None:
    """Check that a run can be written there, by a trial beside it that leaves nothing behind, and what `resume` names.

    Raises:
        UserError: it cannot, or the folder holds something that is no run; or `resume` names no checkpoint.
    """
    path, named = _run_path(output_dir), checkpoint_path(resume)
    if named is not None and not _began_at(path, named):
        check_named(named)
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
    path = Path(os.path.realpath(Path(output_dir).expanduser()))
    is_locked = (path / LOCK_FILE).exists()  # a run of ours, which may be about to write its configuration
    if not is_locked and _content(path) and not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"`output_dir` {output_dir!r} holds files, and no {CONFIG_FILE} of a run",
            expected="a new or empty folder, or that of an earlier run",
            remedy="output_dir=ANOTHER_FOLDER",
        )
    return path


def _content(path: Path) -> list[str]:
    """What lies in a folder, lock and half-written files left out; nothing where there is none."""
    _, folders, files = next(os.walk(path), ("", [], []))
    return [name for name in (*folders, *files) if not name.startswith(".")]


def _open(values: Mapping[str, Any], path: Path, resume: str) -> RunFolder:
    named = checkpoint_path(resume)
    has_begun = named is not None and _began_at(path, named)
    if named is not None:
        values = {**values, "resume": str(named)}
    if named is not None and not has_begun:
        _check_start(named, values)
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        if not _content(path):
            return _begin(path, values, lock, named)
        if resume != "never" and _is_unfinished_run_of(path, values):
            if named is None or has_begun:
                return _continue(path, values, lock)
            if named == last_checkpoint(path):
                return _reopen(path, values, lock, named)
        if named is not None and has_begun:
            _check_start(named, values)
        path.rename(kept := free_name(path))
        (kept / LOCK_FILE).unlink()
        log.info("the earlier run in %s is kept as %s", path, kept)
        path.mkdir(exist_ok=True)
        with lock:
            lock = _lock(path)
        if named is not None and named.is_relative_to(path):
            if named.parent == path:
                _copy_history(kept, path)
            named = kept / named.relative_to(path)
        return _begin(path, values, lock, named)
    except BaseException:
        lock.close()
        raise


def _continue(path: Path, values: Mapping[str, Any], lock: IO[str]) -> RunFolder:
    """The unfinished run of this configuration, from its newest whole checkpoint after step 0.

    Going on from that of step 0 would be starting anew without the first evaluation.

    Raises:
        UserError: there are only damaged ones.
    """
    saved = [folder for step, folder in checkpoints(path).items() if step]
    start = checkpoint_path(read_config(path).get("resume", "auto"))
    if not saved and start is not None:  # it was stopped before it had copied the one that it begins at
        _check_start(start, values)
        return _begin(path, {**values, "resume": str(start)}, lock, start)
    whole, problems = first_whole(saved)
    if saved and whole is None:
        raise UserError(
            f"no checkpoint of the unfinished run in {path} is whole: {'; '.join(problems)}",
            expected="a whole checkpoint to continue from",
            remedy="resume=CHECKPOINT goes on from one that lies elsewhere; resume=never keeps this run aside and "
            "starts anew at step 0",
        )
    for problem in problems:
        log.warning("passed over, and set aside as .damaged: %s", problem)
    return _reopen(path, values, lock, whole)


def _copy_history(kept: Path, path: Path) -> None:
    """What a run has logged, for one that goes back to a checkpoint of it; what came after that is left out later."""
    for name in _HISTORY:
        if (kept / name).is_dir():
            shutil.copytree(kept / name, path / name)
        elif (kept / name).is_file():
            shutil.copy2(kept / name, path / name)


def _begin(path: Path, values: Mapping[str, Any], lock: IO[str], start: Path | None) -> RunFolder:
    """A run that is new in this folder, from step 0 or from a checkpoint that lies elsewhere."""
    if start is None:
        return _reopen(path, values, lock, None)
    _write_config(path, values)  # names the checkpoint: without it the run would begin at step 0 once this is cut off
    shutil.rmtree(path / STAGING_FOLDER, ignore_errors=True)
    checkpoint = copy_checkpoint(start, path, path / STAGING_FOLDER)
    log.info("%s goes on from %s", path, start)
    return _reopen(path, values, lock, checkpoint)


def _reopen(path: Path, values: Mapping[str, Any], lock: IO[str], checkpoint: Path | None) -> RunFolder:
    _write_config(path, values)
    console.copy_to(path / LOG_FILE)
    shutil.rmtree(path / STAGING_FOLDER, ignore_errors=True)
    step = 0
    if checkpoint is not None:
        step = checkpoint_step(checkpoint) or 0
        set_aside_newer(checkpoint)
        log.info("continuing %s after step %d", path, step)
    drop_metrics_after(path / METRICS_FILE, step)
    _drop_tables_after(path, step)
    return RunFolder(path, checkpoint, lock)


def _write_config(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path / CONFIG_FILE, yaml.safe_dump(dict(values), sort_keys=True))


def _lock(path: Path) -> IO[str]:
    handle, is_ours = None, False
    try:
        handle = try_lock(path / LOCK_FILE)
        is_ours = handle is not None and os.path.samestat(os.fstat(handle.fileno()), os.stat(path / LOCK_FILE))
    except FileNotFoundError:  # as with another file of that name: a new folder is being put in the place of this one
        pass
    if handle is None or not is_ours:
        raise UserError(
            f"another process is training in {path}",
            expected="one run for each output folder",
            remedy="wait for it, or set output_dir=ANOTHER_FOLDER",
        )
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def read_config(run: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the configuration in the folder of a run is damaged.
    """
    saved = _saved_config(run)
    if saved is None:
        raise UserError(
            f"{run / CONFIG_FILE} is damaged",
            expected="the configuration as the run wrote it",
            remedy="put a copy of it there; or resume=never keeps that run aside and starts anew, and "
            "resume=FOLDER/checkpoint-N goes on from one of its checkpoints",
        )
    return saved


def _saved_config(run: Path) -> dict[str, Any] | None:
    """None where there is none, or a damaged one."""
    try:
        saved = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, FileNotFoundError):
        return None
    return saved if isinstance(saved, dict) else None


def _began_at(path: Path, named: Path) -> bool:
    """Whether the run in a folder is one that was begun at this checkpoint, which it may have outlived."""
    return (_saved_config(path) or {}).get("resume") == str(named)


def _is_unfinished_run_of(path: Path, values: Mapping[str, Any]) -> bool:
    """
    Raises:
        UserError: that cannot be told, and nobody has said where to go on from.
    """
    if checkpoint_path(values.get("resume", "auto")) is not None and _saved_config(path) is None:
        return False
    changed = _differences(saved := read_config(path), values, saved.keys() | values.keys())
    if changed:
        log.info("a run with other settings (%s) lies in %s", ", ".join(changed), path)
    return not changed and not is_finished(path)


def is_finished(path: Path) -> bool:
    """Whether a run has its summary. A damaged one is kept, and the run ends once more: it writes it again."""
    file = path / SUMMARY_FILE
    if not file.exists() or _is_json(file):
        return file.exists()
    file.rename(kept := free_name(file.with_name(f"{SUMMARY_FILE}.damaged")))
    log.warning("%s was damaged, and is kept as %s; the run in its folder writes it again", file, kept)
    return False


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _differences(saved: Mapping[str, Any], values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if key not in _KEYS_THAT_MAY_DIFFER and saved.get(key) != values.get(key))


def last_checkpoint(path: Path) -> Path | None:
    """The newest after step 0, whole or not."""
    return next((folder for step, folder in checkpoints(path).items() if step), None)


def _check_start(named: Path, values: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: there is no whole checkpoint to begin at, or it is that of another model, adapter or optimizer.
    """
    check_named(named)
    check_whole(named)
    if (config := _saved_config(named.parent)) is None:
        log.warning("%s lies beside no configuration, so that the settings of its run are not known", named)
        return
    saved, given = _flat(config), _flat(values)
    changed = _differences(saved, given, saved.keys() & given.keys())
    if wrong := _FIXED_BY_A_CHECKPOINT.intersection(changed):
        raise UserError(
            f"`resume` {str(named)!r} is of a run with other settings: {', '.join(sorted(wrong))}",
            expected=f"model, adapter and optimizer as in {named.parent / CONFIG_FILE}",
            remedy="set them as there; learning_rate, max_steps, data, rewards and what is logged may be others",
        )
    if changed:
        log.warning("it goes on from %s with other settings: %s", named, ", ".join(changed))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the section `model_args` by names of their own: `model_args.lora_r`."""
    section = values.get("model_args")
    inner = {f"model_args.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
    return {key: value for key, value in values.items() if key != "model_args"} | inner


def _drop_tables_after(path: Path, step: int) -> None:
    """Completions and evaluations of steps that the resumed run will make again, and may not log at the same step."""
    for folder in (COMPLETIONS_FOLDER, EVALUATIONS_FOLDER, TOKEN_SCORES_FOLDER):
        for file in (path / folder).glob("*.parquet"):
            number = re.fullmatch(r"(?:completions|evaluation)_(\d+)", file.stem)
            if number is not None and (not step or int(number[1]) > step):
                file.unlink()


def write_evaluation(path: Path, step: int, table: Mapping[str, list[Any]]) -> None:
    """Write `evaluations/evaluation_STEP.parquet` of the run in `path`, over an earlier one of the step."""
    write_table(path / EVALUATIONS_FOLDER / f"evaluation_{step:05d}.parquet", table)


def write_table(file: Path, table: Mapping[str, list[Any]]) -> None:
    """A Parquet file that appears whole, in a folder that is made where it is missing."""
    import pandas as pd  # takes a second: not before the output folder is checked

    file.parent.mkdir(exist_ok=True)
    with replaced_file(file) as partial:
        pd.DataFrame(table).to_parquet(partial)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    write_whole(path / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
