"""Each setting of TRL and transformers is used, derived or refused; one that a new version brings fails here."""

import ast
import functools
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from preflight.hardware import check_hardware_and_plan
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.library_settings import GRPO_CONFIG, ONLY_WITH_VLLM_SERVER, SFT_CONFIG, TRAINING_ARGUMENTS
from schemas.run import ConfigError, load_run_config
from schemas.trl_fields import argument_fields

LIBRARIES = {library.arguments_class: library for library in (GRPO_CONFIG, TRAINING_ARGUMENTS, SFT_CONFIG)}
RUN_OF = {"GRPOConfig": "teacher_rlt_tiny", "TrainingArguments": "llada_tiny", "SFTConfig": "student_sft_tiny"}
EACH = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


@functools.cache
def composed(name):
    return compose_run_config(name, [])


def load(library=GRPO_CONFIG, **settings):
    return load_run_config(composed(RUN_OF[library.arguments_class]) | settings)


def another_value(default: object) -> object:
    match default:
        case bool():
            return not default
        case int() | float():
            return default + 1
        case _:
            return "secret-value"


@EACH
def test_every_setting_of_the_installed_version_is_used_derived_or_refused(library):
    entered = Counter([*library.used, *library.derived, *library.refused])
    fields = set(argument_fields(library.arguments_class))
    assert fields - entered.keys() == set(), "new in this version: enter it in schemas/library_settings.py"
    assert entered.keys() - fields == set(), "gone in this version"
    assert max(entered.values()) == 1


def read_settings() -> set[str]:
    """Names that the libraries' trainers, or ours, read from their arguments."""
    files = [
        path
        for folder in ("trainers", "planner", "data", "schemas")
        for path in (CONFIG_ROOT.parent / folder).iterdir()
    ]
    for package, pattern in (
        ("trl", "trainer/grpo_trainer.py"),
        ("trl", "trainer/sft_trainer.py"),
        ("transformers", "trainer*.py"),
    ):
        files += Path(importlib.util.find_spec(package).origin).parent.glob(pattern)
    files.append(Path(importlib.util.find_spec("transformers").origin).parent / "integrations/integration_utils.py")
    holders = {
        "args",
        "self.args",
        "grpo",
        "config.grpo",
        "self.grpo",
        "arguments",
        "config.arguments",
        "config.args",
        "config.sft",
    }
    return {
        node.attr
        for path in files
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in holders
    }


@EACH
def test_what_is_used_is_read_somewhere(library):
    read_by_name = {"log_level", "logging_steps", "eval_steps", "save_steps", "warmup_steps"}  # by methods, getattr
    assert library.used - read_settings() - read_by_name == set()


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in LIBRARIES for key in sorted(LIBRARIES[name].refused)]
)
def test_a_refused_setting_may_have_its_default_alone(name, key):
    library = LIBRARIES[name]
    default = argument_fields(library.arguments_class)[key][1]
    load(library, **{key: default})
    with pytest.raises(ConfigError) as error:
        load(library, **{key: another_value(default)})
    assert f"- `{key}` cannot be set: {library.refused[key]}. Remove it." in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in LIBRARIES for key in sorted(LIBRARIES[name].derived)]
)
def test_a_derived_setting_names_what_to_set_instead(name, key):
    library = LIBRARIES[name]
    with pytest.raises(ConfigError) as error:
        load(library, **{key: argument_fields(library.arguments_class)[key][1]})
    assert f"`{key}` follows from other settings. Use {library.derived[key]}." in str(error.value)


def test_a_token_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="set HF_TOKEN in the environment") as error:
        load(hub_token="hf_abcdefgh")
    assert "hf_abcdefgh" not in str(error.value)


@pytest.mark.parametrize("key", sorted(ONLY_WITH_VLLM_SERVER))
def test_settings_of_the_server_need_the_server(key):
    default = argument_fields("GRPOConfig")[key][1]
    value = {"generation_kwargs": {"bad_words": []}}.get(key, another_value(default))
    load(**{key: default})
    with pytest.raises(ConfigError, match=f"`{key}` is for a vLLM server, and `use_vllm_server` is false"):
        load(**{key: value})
    unquantised = {"model_args": {"load_in_8bit": False}}
    assert getattr(load(use_vllm_server=True, **unquantised, **{key: value}).grpo, key) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "best"}, "`save_strategy` is 'best'. Input should be 'no', 'steps' or 'epoch'"),
        ({"lr_scheduler_type": "greedy"}, "`lr_scheduler_type` greedy follows a figure"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type` reduce_lr_on_plateau follows a figure"),
        ({"debug": "tpu_metrics_debug"}, "`debug` is 'tpu_metrics_debug'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs` names tokenize, which"),
        ({"chat_template_kwargs": "text"}, "`chat_template_kwargs` is 'text'. Input should be a valid dictionary"),
    ],
)
def test_values_that_would_fail_late_are_refused_with_the_configuration(settings, message):
    with pytest.raises(ConfigError) as error:
        load(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_order_of_a_masked_diffusion_runs_data_has_two_names():
    with pytest.raises(
        ConfigError, match="`train_sampling_strategy` is 'group_by_length'. Input should be 'random' or"
    ):
        load(TRAINING_ARGUMENTS, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_liger_kernel": True}, "`use_liger_kernel` is true, and it is not installed"),
        ({"fp16": True, "bf16": False}, "`fp16` is true on a CPU"),
        ({"push_to_hub": True}, "`push_to_hub` is set, and there is no access token"),
        ({"log_completions_hub_repo": "me/texts"}, "`log_completions_hub_repo` is set, and there is no access token"),
    ],
)
def test_what_this_machine_lacks_is_said_before_anything_is_loaded(settings, message, monkeypatch):
    monkeypatch.setattr("preflight.hardware.pick_device", lambda device_map: torch.device("cpu"))
    monkeypatch.setattr("preflight.hardware.is_installed", lambda name: name != "liger_kernel")
    monkeypatch.setattr("preflight.hardware.get_token", lambda: None)
    monkeypatch.setattr("preflight.hardware.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as error:
        check_hardware_and_plan(load(**settings))
    assert message in str(error.value) and "remedy:" in str(error.value)


def test_the_hub_is_not_asked_where_it_is_switched_off(monkeypatch):
    monkeypatch.setattr("preflight.hardware.pick_device", lambda device_map: torch.device("cpu"))
    monkeypatch.setattr("preflight.hardware.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="`push_to_hub` is set, and HF_HUB_OFFLINE is on"):
        check_hardware_and_plan(load(push_to_hub=True))
