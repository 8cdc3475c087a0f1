"""Composition of run configurations with Hydra, from names and `key=value` words.

Run configs are primary configs. A search-path plugin adds `cfgs` and `cfgs/run_cfg` to Hydra's search path, so that
`--config-name=NAME`, `--config-path=cfgs/run_cfg --config-name=NAME` and `compose` find both from any directory.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from schemas.methods import DEFAULT_METHOD, METHODS
from schemas.run import refuse_secret

CONFIG_ROOT = Path(__file__).resolve().parent.parent / "cfgs"
JOB_OF_A_SWEEP = "--job-of-a-sweep"
"""The only word of a `train.py` call that trains one composed configuration, read from its stdin as JSON."""
_PRIMARY = ("run_cfg", "pipeline_cfg")
"""Folders of configurations that are named by themselves; the other folders in `cfgs` are groups."""
_KEY_VALUE = re.compile(r"^([A-Za-z_][\w.]*)=")


class RunConfigSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in (CONFIG_ROOT, *(CONFIG_ROOT / name for name in _PRIMARY)):
            search_path.append(provider="rlt", path=f"file://{folder}")


def register_search_path() -> None:
    """Make our configuration folders known to Hydra. Call before `hydra.main` or `compose`."""
    if RunConfigSearchPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(RunConfigSearchPath)


def run_config_names() -> list[str]:
    """Names of the shipped run configurations."""
    return sorted(path.stem for path in (CONFIG_ROOT / "run_cfg").glob("*.yaml"))


def pipeline_names() -> list[str]:
    """Names of the shipped pipelines."""
    return sorted(path.stem for path in (CONFIG_ROOT / "pipeline_cfg").glob("*.yaml"))


def run_config_name(word: str) -> str:
    """The name in NAME, NAME.yaml, NAME.yml or a path to either."""
    return Path(word).name.removesuffix(".yaml").removesuffix(".yml")


def config_groups() -> list[str]:
    return sorted(path.name for path in CONFIG_ROOT.iterdir() if path.is_dir() and path.name not in _PRIMARY)


def to_hydra_overrides(words: Sequence[str]) -> list[str]:
    """Command-line words as Hydra wants them.

    `model_cfg=x` names a group, which is mounted at the root: `model_cfg@_global_=x`. Any other `key=value` becomes
    `++key=value`, so that TRL's settings need no declaration of ours; unknown keys are found by `load_run_config`.

    Raises:
        ConfigError: a word sets a secret.
    """
    groups, overrides = set(config_groups()), []
    for word in words:
        refuse_secret(word)
        match = _KEY_VALUE.match(word)
        if match is None or match[1].startswith("hydra."):
            overrides.append(word)
        elif match[1] in groups:
            overrides.append(word.replace("=", "@_global_=", 1))
        else:
            overrides.append(f"++{word}")
    return overrides


def to_values(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain containers with every interpolation resolved."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict), "a run configuration is a mapping"
    return {str(key): value for key, value in values.items()}


def compose_run_config(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose a run configuration by name, outside `hydra.main` (tools and tests); plain containers, not validated."""
    register_search_path()
    callers = GlobalHydra.instance().hydra  # set where the calling program uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_ROOT), version_base="1.3"):
            name = run_config_name(name)
            return to_values(compose(config_name=name, overrides=to_hydra_overrides([f"run_name={name}", *overrides])))
    finally:
        GlobalHydra.instance().hydra = callers


def setting_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as Python values -> the words of the command line that say the same.

    E.g. `{"max_steps": 2, "model_args": {"lora_r": 8}, "run_name": "a b"}` -> `max_steps=2 model_args={lora_r:8}
    run_name='a b'`. A mapping changes the keys that it names, as on the command line.

    Raises:
        TypeError: a value that a command line cannot say.
    """
    groups = config_groups()
    return [f"{key}={value if key in groups else _literal(value)}" for key, value in settings.items()]


def _literal(value: Any) -> str:
    """A value in Hydra's grammar for overrides."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Real):
        return repr(int(value) if isinstance(value, Integral) else float(value))
    if isinstance(value, str | Path):
        text = str(value)
        # A backslash counts as one unless a quote, or the end, follows.
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_literal, value)) + "]"
    raise TypeError(
        f"{value!r} is a {type(value).__name__}; settings are numbers, texts, lists, mappings, True, False, None"
    )


def composition_problem(error: Exception) -> str:
    """Message for a configuration that cannot be composed: what Hydra says, and which ones there are."""
    return f"{error}\nshipped: {', '.join([*run_config_names(), *pipeline_names()])}"


def command_line(words: Sequence[str]) -> list[str]:
    """The words of a `train.py` call as Hydra wants them, with `run_name` set to the name of the configuration."""
    places = [i + 1 for i, word in enumerate(words[:-1]) if word in ("--config-name", "-cn")]
    places += [i for i, word in enumerate(words) if word.startswith("--config-name=")]
    name = run_config_name(words[places[-1]].rpartition("=")[2]) if places else METHODS[DEFAULT_METHOD].index
    words = [word.removesuffix(".yml") if i in places else word for i, word in enumerate(words)]
    words = [*words, *([] if _sets_run_name(words) else [f"run_name={name}"])]
    words = ["dry_run=true" if word == "--dry-run" else word for word in words]
    # Hydra's parser wants the overrides in one piece; people write them before and after the options.
    return to_hydra_overrides(sorted(words, key=_is_override))


def with_sweep_folders(composed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a sweep, each with a folder of its own that is named after the settings in which they differ.

    The folders lie in `output_dir.sweep`: beside what a single run has left in `output_dir`, never inside it.
    """
    if len({values["output_dir"] for values in composed}) == len(composed):
        return list(composed)
    flat = [_flat(values) for values in composed]
    swept = sorted(key for key in set().union(*flat) if any(values.get(key) != flat[0].get(key) for values in flat))
    folders = [",".join(f"{key}={values.get(key)}".replace("/", "_") for key in swept) for values in flat]
    if len(set(folders)) < len(folders):  # `seed=1,1`
        folders = [f"{number},{folder}".rstrip(",") for number, folder in enumerate(folders, start=1)]
    return [
        {**values, "output_dir": f"{values['output_dir'].rstrip('/')}.sweep/{folder}"}
        for values, folder in zip(composed, folders, strict=True)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of sections under dotted names, such as `model_args.lora_r`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _is_override(word: str) -> bool:
    return word.startswith(("~", "+")) or ("=" in word and not word.startswith("-"))


def _sets_run_name(words: Sequence[str]) -> bool:
    return any(word.startswith("run_name=") for word in words)
