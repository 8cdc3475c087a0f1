"""What ends a run that is no mistake of its own, as one message: what happened, what to do, where it goes on."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from core.errors import StoppedError, UserError
from core.faults import disk_fault, first_line, is_out_of_memory, phase_of
from core.types import Phase
from core.units import format_gb
from planner.fit import levers
from planner.plan import MemoryPlan
from runs.run_folder import last_checkpoint
from schemas.any_run import AnyRunConfig
from schemas.methods import as_training
from schemas.run import ConfigError

_NUM_LEVERS = 3
T = TypeVar("T")


def with_faults_explained(run: Callable[[], T], config: AnyRunConfig, values: Mapping[str, Any], plan: MemoryPlan) -> T:
    """The result of a whole run; what a full disk or an error of memory raises becomes one message.

    Raises:
        StoppedError: in their place, and without them: their frames hold tensors, and the lock of the run's folder.
    """
    try:
        return run()
    except (StoppedError, UserError, ConfigError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            stopped = _out_of_memory(error, config, values, plan)
        elif (fault := disk_fault(error)) is not None:
            stopped = _disk(fault, config)
        else:
            raise
    raise stopped


def goes_on_from(output_dir: Path, resume: str, *, changed: bool = False) -> str:
    """What continues a run that stopped, and from where; `changed`: with other settings too."""
    command = "resume=auto" if resume == "never" else "the same command"
    checkpoint = last_checkpoint(output_dir) if output_dir.is_dir() else None
    if checkpoint is None:
        return "no checkpoint yet: the same command starts anew"
    with_changes = f"; with other settings add resume={checkpoint}" if changed else ""
    return f"{command} continues from {checkpoint}{with_changes}"


def _continues(config: AnyRunConfig, *, changed: bool = False) -> str:
    if as_training(config) is None:
        return "the same command goes on after what is saved"
    return goes_on_from(Path(config.arguments.output_dir), config.resume, changed=changed)


def _out_of_memory(error: Exception, config: AnyRunConfig, values: Mapping[str, Any], plan: MemoryPlan) -> StoppedError:
    failed = phase_of(error)
    phase = failed.phase if failed is not None else Phase.LOAD
    measured = f", {format_gb(failed.measured_bytes)} measured" if failed is not None else ""
    gpu = f", of a GPU of {format_gb(plan.gpu_bytes)}" if plan.gpu_bytes is not None else ""
    retries = f", after {failed.num_retries} retries (max_oom_retries)" if failed and failed.num_retries else ""
    return StoppedError(
        f"out of memory ({phase}){retries}: {first_line(error)}",
        expected=f"{format_gb(plan.peak_bytes(phase))} by the plan in this phase{measured}{gpu}",
        remedy=_what_saves(values, phase),
        continues=_continues(config, changed=True),
    )


def _what_saves(values: Mapping[str, Any], phase: Phase) -> str:
    """What the planner would change, and what it saves; first what saves most in this phase."""
    try:
        found = sorted(levers(values), key=lambda lever: lever.phase != phase)[:_NUM_LEVERS]
    except UserError:  # the shape of a model is not known without its files
        found = []
    changes = [f"{lever.words} ({format_gb(lever.saved_bytes)} less, {lever.phase})" for lever in found]
    return "; or ".join(changes) or "a smaller train_batch_size or shorter rows; see whether another process is there"


def _disk(fault: str, config: AnyRunConfig) -> StoppedError:
    folders = {
        "output_dir": config.arguments.output_dir,
        "the temporary folder": tempfile.gettempdir(),
        "shared memory": "/dev/shm",
        "the home folder, with caches": Path.home(),
    }
    free = [f"{name} {format_gb(size)}" for name, path in folders.items() if (size := _free_bytes(path)) is not None]
    return StoppedError(
        fault,
        expected="folders that can be written, and room in them; free: " + ", ".join(free),
        remedy="make room, or point output_dir, TMPDIR, HF_HOME or XDG_CACHE_HOME elsewhere; save_total_limit=1 keeps "
        "one checkpoint",
        continues=_continues(config),
    )


def _free_bytes(path: str | Path) -> int | None:
    """Of the disk that a folder lies on, or would."""
    whole = Path(path).expanduser().absolute()
    try:
        return shutil.disk_usage(next(folder for folder in (whole, *whole.parents) if folder.exists())).free
    except OSError:  # a disk that does not answer is what is being reported
        return None
