"""Trained run, read from its folder: configuration, adapter, and the model that they make together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.log import log
from optimization.gpu import gpu_bytes
from planner.fit import resolve_auto
from runs.checkpoints import newest_whole
from runs.run_folder import CONFIG_FILE, read_config
from schemas.compose import compose_run_config, run_config_names
from schemas.methods import as_kind
from schemas.run import RunConfig, load_run_config

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A teacher's run as its folder, or the name of a run configuration, describes it."""

    name: str
    """As it was given."""
    config: RunConfig
    """`model_args.adapter_path` is the trained adapter, where there is one, and the reference the shared one."""
    adapter: Path | None
    """Folder of the adapter; None for a run configuration, whose teacher is still the base."""

    @property
    def row_len(self) -> int:
        """Tokens of the longest prompt and the longest completion together."""
        return self.config.max_prompt_length + self.config.grpo.max_completion_length


def open_run(run: str | Path, *, needs_adapter: bool = False) -> TrainedRun:
    """A run's folder, one of its checkpoints (`results/NAME/checkpoint-20`), or the name of a run configuration.

    A folder wins over a configuration of the same name. A run that did not end is read from its last checkpoint.

    Raises:
        UserError: there is neither, it is not a teacher's run, or (`needs_adapter`) nothing was trained yet.
        ConfigError: its configuration is not valid any more.
    """
    folder = Path(run).expanduser()
    if folder.is_dir():
        values, adapter = _read_config(folder), _adapter_in(folder)
    else:
        values, adapter = _compose(str(run)), None
    loaded = load_run_config(resolve_auto(values, gpu_bytes()))
    if (config := as_kind(loaded, RunConfig)) is None:
        raise UserError(
            f"{str(run)!r} is a run of the method {loaded.method}",
            expected="a teacher's run (method rlt)",
            remedy="the model card in a run's folder says how its model is used",
        )
    if adapter is None and needs_adapter:
        raise UserError(
            f"{str(run)!r} holds no trained adapter",
            expected=f"the folder of a run, or of one of its checkpoints, with {ADAPTER_FILE}",
            remedy=f"train it first: python train.py --config-name={config.run_name}",
        )
    if adapter is not None:
        config = replace(config, model_args=replace(config.model_args, adapter_path=str(adapter)))
    return TrainedRun(name=str(run), config=replace(config, reference_model="shared"), adapter=adapter)


def _read_config(folder: Path) -> Mapping[str, Any]:
    for place in (folder, folder.resolve().parent):  # a checkpoint's configuration is that of its run
        if (place / CONFIG_FILE).is_file():
            return read_config(place)
    raise UserError(
        f"{str(folder)!r} is not the folder of a run: it holds no {CONFIG_FILE}",
        expected="a folder that training wrote, such as results/teacher_rlt_tiny, or one of its checkpoints",
        remedy="give that folder, or the name of a run configuration: " + ", ".join(run_config_names()),
    )


def _adapter_in(folder: Path) -> Path | None:
    if (folder / ADAPTER_FILE).is_file():
        return folder
    checkpoint = newest_whole(folder)
    if checkpoint is not None:
        log.info("the run in %s has not ended; its last checkpoint is taken: %s", folder, checkpoint)
    return checkpoint


def _compose(name: str) -> Mapping[str, Any]:
    try:
        return compose_run_config(Path(name).name)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{name!r} is neither a folder nor a run configuration",
            expected=f"a folder that training wrote, or one of {', '.join(run_config_names())}",
            remedy=f"check the path (the current folder is {Path.cwd()})",
        ) from error
