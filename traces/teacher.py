"""The teacher that writes the traces: the trained one of a run's folder, or the untrained base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.log import log
from models.trained import ADAPTER_FILE
from runs.checkpoints import newest_whole
from runs.run_folder import CONFIG_FILE, read_config
from schemas.traces import TracesRunConfig

_MUST_AGREE = ("model_name_or_path", "tag_format", "prompt_style", "chat_template_kwargs")
"""What the teacher was trained with and cannot do without."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def with_teacher(config: TracesRunConfig) -> TracesRunConfig:
    """The configuration with the adapter, or the whole weights, that lie in `teacher_run`.

    Raises:
        UserError: there is no trained teacher, or one of another base or prompt format.
    """
    if config.teacher_run is None:
        log.info("the teacher is untrained: %s", config.model_name_or_path)
        return config
    folder = Path(config.teacher_run).expanduser()
    trained = _trained_in(folder)
    _check_agreement(config, folder)
    log.info("the teacher is that of %s", trained)
    if (trained / ADAPTER_FILE).is_file():
        return replace(config, model_args=replace(config.model_args, adapter_path=str(trained)))
    return replace(config, model_name_or_path=str(trained))


def _trained_in(folder: Path) -> Path:
    """The folder itself, or the last whole checkpoint of a run that has not ended."""
    if _has_result(folder):
        return folder
    checkpoint = newest_whole(folder) if folder.is_dir() else None
    if checkpoint is not None and _has_result(checkpoint):
        log.warning("the run in %s has not ended; its last checkpoint is taken: %s", folder, checkpoint)
        return checkpoint
    raise UserError(
        f"`teacher_run` {str(folder)!r} " + ("holds no trained teacher" if folder.is_dir() else "is not there"),
        expected="the folder of a run that trained a teacher, or of one of its checkpoints",
        remedy="train it first, e.g. ./launch_mono.sh teacher_rlt_tiny; teacher_run=null takes the untrained base",
    )


def _has_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_FILE, *_WEIGHTS))


def _check_agreement(config: TracesRunConfig, folder: Path) -> None:
    saved = next((read_config(f) for f in (folder, folder.resolve().parent) if (f / CONFIG_FILE).is_file()), None)
    if saved is None:
        log.warning("%s holds no %s: whether its teacher knows this prompt format is not checked", folder, CONFIG_FILE)
        return
    own: dict[str, Any] = {key: getattr(config, key) for key in _MUST_AGREE}
    other = {key: saved[key] for key in _MUST_AGREE if key in saved and (saved[key] or None) != (own[key] or None)}
    if other:
        raise UserError(
            f"the teacher of {str(folder)!r} was trained with other settings: "
            + ", ".join(f"{key} {value!r} (here {own[key]!r})" for key, value in other.items()),
            expected="its base model and its prompt format",
            remedy=" ".join(f"{key}={value}" for key, value in other.items()),
        )
