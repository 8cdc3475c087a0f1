"""Checkpoints of a run: published whole with a manifest, verified before they are used, rotated.

checkpoint-N/manifest.json   step, and size and SHA-256 of every file; the checkpoint appears when it is complete
checkpoint-N.damaged/        set aside: a run goes on from an older one than this; never read again and never deleted
"""

import glob
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from core.errors import UserError
from core.log import log
from runs.files import free_name, sync_folder, write_whole

MANIFEST_FILE, STATE_FILE = "manifest.json", "trainer_state.json"
_NEEDED_FILES = (STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth")
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    files: dict[str, FileRecord]


_MANIFEST = TypeAdapter(Manifest)


def checkpoint_step(folder: Path) -> int | None:
    """The step that a folder is a checkpoint of by its name; None where it is none of a run's."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> dict[int, Path]:
    """Step -> checkpoint of a run, newest first, whole or not."""
    found = {step: folder for folder in run.iterdir() if (step := checkpoint_step(folder)) is not None}
    return {step: found[step] for step in sorted(found, reverse=True) if found[step].is_dir()}


def publish_checkpoint(staged: Path, target: Path) -> None:
    """Write the manifest of a checkpoint in a staging folder, and make it appear under its final name in one step."""
    files = [file for file in sorted(staged.rglob("*")) if file.is_file() and file != staged / MANIFEST_FILE]
    manifest = Manifest(
        step=int(target.name.rpartition("-")[2]),
        files={file.relative_to(staged).as_posix(): _record(file, sync=True) for file in files},
    )
    write_whole(staged / MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")
    for folder in {file.parent for file in files}:
        sync_folder(folder)
    if target.exists():
        os.replace(target, replaced := staged.with_name("replaced"))
        os.replace(staged, target)
        shutil.rmtree(replaced)
    else:
        os.replace(staged, target)
    sync_folder(target.parent)


def _record(file: Path, *, sync: bool = False) -> FileRecord:
    with open(file, "rb") as handle:
        if sync:
            os.fsync(handle.fileno())
        return FileRecord(os.fstat(handle.fileno()).st_size, hashlib.file_digest(handle, "sha256").hexdigest())


def copy_checkpoint(source: Path, run: Path, staging: Path) -> Path:
    """Publish a checkpoint of another run in `run`; where both lie on one disk it takes no space (hard links)."""
    staged, target = staging / source.name, run / source.name
    shutil.copytree(source, staged, copy_function=_link_or_copy)
    publish_checkpoint(staged, target)
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, read without running any of it; None for a whole one."""
    step = checkpoint_step(checkpoint)
    try:
        manifest = _MANIFEST.validate_json((checkpoint / MANIFEST_FILE).read_bytes())
        if manifest.step != step:
            return f"its {MANIFEST_FILE} is that of step {manifest.step}"
        return next(_differences(checkpoint, manifest), None)
    except FileNotFoundError:
        return _damage_without_manifest(checkpoint)
    except ValidationError:
        return f"{MANIFEST_FILE} is damaged"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"


def _differences(checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        if not (file := checkpoint / name).is_file():
            yield f"{name} is missing"
        elif (size := file.stat().st_size) != record.bytes:
            yield f"{name} has {size:,} bytes, and {record.bytes:,} were saved"
        elif _record(file) != record:
            yield f"{name} does not hold what was saved"


def _damage_without_manifest(checkpoint: Path) -> str | None:
    """Of a run from before manifests: whether all files are there and complete, as far as they themselves can tell."""
    if any((other / MANIFEST_FILE).exists() for other in checkpoints(checkpoint.parent).values()):
        return f"{MANIFEST_FILE} is missing"
    weights = sorted(checkpoint.rglob("*.safetensors"))
    missing = [name for name in _NEEDED_FILES if not (checkpoint / name).is_file()] + ["weights"] * (not weights)
    if missing:
        return f"missing: {', '.join(missing)}"
    try:
        for file in weights:
            safe_open(file, framework="numpy")
        for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            if zipfile.ZipFile(file).testzip() is not None:
                return f"{file.name} is damaged"
        if json.loads((checkpoint / STATE_FILE).read_bytes())["global_step"] != checkpoint_step(checkpoint):
            return f"its {STATE_FILE} is that of another step"
    except (SafetensorError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        return f"a file of it is damaged ({error})"
    log.warning("%s is from before checkpoints had a manifest: its files are complete, not verified", checkpoint)
    return None


def first_whole(
    folders: Iterable[Path], damage_of: Callable[[Path], str | None] = damage
) -> tuple[Path | None, list[str]]:
    """The first checkpoint without damage, and what is wrong with those before it."""
    problems: list[str] = []
    for folder in folders:
        if (problem := damage_of(folder)) is None:
            return folder, problems
        problems.append(f"{folder.name}: {problem}")
    return None, problems


def newest_whole(run: Path) -> Path | None:
    """The checkpoint to use of a run, with a warning for each newer one that is damaged; None where none is whole."""
    checkpoint, problems = first_whole(checkpoints(run).values())
    for problem in problems:
        log.warning("passed over in %s: %s", run, problem)
    return checkpoint


def checkpoint_path(resume: str) -> Path | None:
    """The folder that `resume` names, without links; None for `auto` and `never`."""
    return None if resume in ("auto", "never") else Path(os.path.realpath(Path(resume).expanduser()))


def check_named(checkpoint: Path) -> None:
    """
    Raises:
        UserError: there is no such folder, or its name does not say its step. Its files are not looked into.
    """
    if checkpoint_step(checkpoint) is None or not checkpoint.is_dir() or not any(checkpoint.iterdir()):
        run = checkpoint.parent
        kept = sorted(run.parent.glob(f"{glob.escape(run.name)}.*/{glob.escape(checkpoint.name)}"))
        raise UserError(
            f"`resume` {str(checkpoint)!r} holds no checkpoint",
            expected="auto, never, or the folder checkpoint-N of a run, N being its step",
            remedy=f"resume={kept[-1]}, which was kept aside with its run"
            if kept
            else "resume=auto continues the last unfinished run of this configuration",
        )


def check_whole(checkpoint: Path) -> None:
    """
    Raises:
        UserError: the checkpoint is damaged; says how, and which of its run is the newest whole one.
    """
    if (problem := damage(checkpoint)) is not None:
        whole, _ = first_whole(checkpoints(checkpoint.parent).values())
        raise UserError(
            f"{checkpoint} is damaged: {problem}",
            expected=f"the files that its {MANIFEST_FILE} lists, as they were saved",
            remedy=f"resume={whole}, the newest whole one there" if whole else "a copy of it; no other there is whole",
        )


def set_aside_newer(checkpoint: Path) -> None:
    """Rename the checkpoints of later steps, which a run that goes on from this one passes over."""
    for step, folder in checkpoints(checkpoint.parent).items():
        if step > (checkpoint_step(checkpoint) or 0):
            folder.rename(free_name(folder.with_name(f"{folder.name}.damaged")))


def rotate_checkpoints(run: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; null keeps all. What is no folder `checkpoint-N` is left alone."""
    for folder in list(checkpoints(run).values())[keep:] if keep else ():
        try:
            shutil.rmtree(folder)
        except OSError as error:  # a link, or a file system at odds: the run is worth more than the space
            log.warning("%s cannot be deleted: %s", folder, error)
