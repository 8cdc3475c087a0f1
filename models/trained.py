"""Trained runs and stored models, read from their folders: configuration, adapter, and the model that they make."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.hub import check_model_path, is_hub_id
from core.log import log
from optimization.gpu import gpu_bytes
from planner.fit import resolve_auto
from runs.checkpoints import newest_whole
from runs.run_folder import CONFIG_FILE, read_config
from schemas.compose import compose_run_config, run_config_names
from schemas.llada import MaskedDiffusionRunConfig
from schemas.methods import as_kind
from schemas.model import ModelArgs
from schemas.run import AnyRunConfig, RunConfig, load_run_config

ADAPTER_FILE, MODEL_FILE = "adapter_config.json", "config.json"


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
        values, adapter = _read_config(folder), _folder_of_weights(folder)
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


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A causal language model as it lies on the hub or on disk: whole, or an adapter and the name of its base."""

    name: str
    """As it was given."""
    weights: str
    """Hub id, folder, or name of an embedded model: the whole model, or the adapter's base."""
    args: ModelArgs
    """How `weights` are loaded: an adapter's base as its run loaded it."""
    adapter: Path | None = None
    """Folder of the adapter."""
    config: AnyRunConfig | None = None
    """Of the run that trained it; None for a model from elsewhere."""

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: beside the adapter where one is there."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if has_own else self.weights


def open_model(name: str | Path, args: ModelArgs) -> StoredModel:
    """A model by hub id, name of an embedded one, model folder, or folder of a run of any method or of a checkpoint.

    `args` say how a whole model is loaded. A run that did not end is read from its last checkpoint.

    Raises:
        UserError: there is none of that name, it is no causal language model, or nothing was trained yet.
        ConfigError: the configuration of its run is not valid any more.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        check_model_path(str(name))
        return StoredModel(name=str(name), weights=str(name), args=args)
    place = _place_of_config(folder)
    config = None if place is None else load_run_config(resolve_auto(read_config(place), gpu_bytes()))
    if config is not None and as_kind(config, MaskedDiffusionRunConfig) is not None:
        raise UserError(
            f"{str(name)!r} is a run of the method {config.method}, whose model fills masks",
            expected="a causal language model, which writes from left to right",
            remedy="the model card in the run's folder says how its model is used",
        )
    found = _folder_of_weights(folder)
    if found is None:
        raise UserError(
            f"{str(name)!r} holds no model and no trained adapter",
            expected=f"a folder with {ADAPTER_FILE} or {MODEL_FILE}, or a run with a whole checkpoint",
            remedy="train it first" + (f": python train.py --config-name={config.run_name}" if config else ""),
        )
    if not (found / ADAPTER_FILE).is_file():
        return StoredModel(name=str(name), weights=str(found), args=args, config=config)
    if config is None:
        weights = _base_of_adapter(found)
        return StoredModel(name=str(name), weights=weights, args=replace(args, adapter_path=str(found)), adapter=found)
    base, args = config.model_names[0], replace(config.model_args, adapter_path=str(found))
    assert base is not None, "an adapter has a base"
    return StoredModel(name=str(name), weights=base, args=args, adapter=found, config=config)


def _place_of_config(folder: Path) -> Path | None:
    """A checkpoint's configuration is that of its run."""
    places = (folder, folder.resolve().parent)
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def _folder_of_weights(folder: Path) -> Path | None:
    """The folder itself, or the newest whole checkpoint of a run in it."""
    if (folder / ADAPTER_FILE).is_file() or (folder / MODEL_FILE).is_file():
        return folder
    checkpoint = newest_whole(folder)
    if checkpoint is not None:
        log.info("the run in %s has not ended; its last checkpoint is taken: %s", folder, checkpoint)
    return checkpoint


def _base_of_adapter(folder: Path) -> str:
    """What an adapter that was trained elsewhere names as its base."""
    base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not (is_hub_id(base) or Path(base).is_dir()):
        raise UserError(
            f"the adapter in {folder} is one of {base!r}, which is not here",
            expected="base_model_name_or_path in its adapter_config.json: a hub id or a folder",
            remedy="write the base's place there",
        )
    check_model_path(base)
    return base


def _read_config(folder: Path) -> Mapping[str, Any]:
    if (place := _place_of_config(folder)) is not None:
        return read_config(place)
    raise UserError(
        f"{str(folder)!r} is not the folder of a run: it holds no {CONFIG_FILE}",
        expected="a folder that training wrote, such as results/teacher_rlt_tiny, or one of its checkpoints",
        remedy="give that folder, or the name of a run configuration: " + ", ".join(run_config_names()),
    )


def _compose(name: str) -> Mapping[str, Any]:
    try:
        return compose_run_config(Path(name).name)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{name!r} is neither a folder nor a run configuration",
            expected=f"a folder that training wrote, or one of {', '.join(run_config_names())}",
            remedy=f"check the path (the current folder is {Path.cwd()})",
        ) from error
