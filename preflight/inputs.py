"""Input checks before torch is imported and the hub is asked: models, data and output folder of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.hub import check_model_path, dataset_is_cached, hub_problem, is_hub_id, model_is_cached, stay_offline
from core.log import log
from data.sources import check_dataset_path
from planner.fit import resolve_auto
from runs.run_folder import CONFIG_FILE, check_output_dir
from schemas.data import ARITHMETIC
from schemas.methods import as_training
from schemas.model import is_embedded
from schemas.run import AnyRunConfig, load_run_config


def check_inputs(values: Mapping[str, Any]) -> None:
    """Check composed values of a run: they validate, local models and data exist, the output folder can be written.

    Raises:
        ConfigError, UserError: what is wrong; nothing was imported or loaded that takes a second.
    """
    config = load_run_config(resolve_auto(values, None))
    for name in _models(config):
        if as_training(config) is not None or not (Path(name).expanduser() / CONFIG_FILE).is_file():
            check_model_path(name)  # what trains nothing also takes runs, such as have only a checkpoint so far
    for name in _datasets(config):
        check_dataset_path(name)
    for name in config.run_folders:
        check_run_folder(name)
    check_output_dir(config.arguments.output_dir, config.resume)


def check_run_folder(name: str) -> None:
    """
    Raises:
        UserError: there is no such folder.
    """
    if not Path(name).expanduser().is_dir():
        raise UserError(
            f"the run folder {name!r} is not there",
            expected=f"the folder of an earlier run (the current folder is {Path.cwd()})",
            remedy="check the path, or train that run first",
        )


def check_hub(config: AnyRunConfig) -> None:
    """Ask the hub once, where the run names something of it; without an answer the run works with what is cached.

    Raises:
        UserError: the hub cannot be reached, and something of it is not cached.
    """
    models = [name for name in _models(config) if is_hub_id(name)]
    datasets = [name for name in _datasets(config) if is_hub_id(name)]
    if not models + datasets or (problem := hub_problem()) is None:
        return
    missing = [name for name in models if not model_is_cached(name)]
    missing += [name for name in datasets if not dataset_is_cached(name)]
    if missing:
        raise UserError(
            f"{problem}, and this machine's cache does not hold {', '.join(missing)}",
            expected="models and data that are here, or a hub that answers",
            remedy="connect (HTTPS_PROXY for a proxy, HF_ENDPOINT for a mirror), or copy them here and name their "
            "folders: model_name_or_path=FOLDER, student_model=FOLDER, dataset_id_or_path=FOLDER",
        )
    log.info("%s: %s taken from this machine's cache", problem, " and ".join(models + datasets))
    stay_offline()


def _models(config: AnyRunConfig) -> Iterator[str]:
    return (name for name in dict.fromkeys(filter(None, config.model_names)) if not is_embedded(name))


def _datasets(config: AnyRunConfig) -> Iterator[str]:
    names = (config.dataset_id_or_path, config.eval_dataset_id_or_path)
    return (name for name in dict.fromkeys(filter(None, names)) if name != ARITHMETIC)
