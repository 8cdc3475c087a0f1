"""The table of methods: every entry resolves, nothing else asks for a configuration's class, a new method needs one."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import schemas.compose
from core.units import gb
from optimization.cli import settings_table
from optimization.training_optim import choose_batch_size
from planner.plan import settings_of
from planner.planned import plan_config
from planner.settings import PlanSettings
from preflight.readiness import check_disk, check_generator, check_models
from schemas.any_run import AnyRunConfig
from schemas.compose import CONFIG_ROOT, compose_run_config, run_config_names
from schemas.methods import METHODS, Entry, Method, as_kind, method_of
from schemas.run import ConfigError, RunConfig, load_run_config, load_teacher_config
from tests.helpers import toy_method
from trainers.start import train_runs

ROOT = CONFIG_ROOT.parent
_ABOUT_CONFIGS = re.compile(r"config|settings|chosen|RunConfig|PlanSettings", re.IGNORECASE)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_entry_of_the_table_resolves(method: Method) -> None:
    entries = [value for field in fields(method) if isinstance(value := getattr(method, field.name), Entry)]
    assert len(entries) >= 4
    assert all(entry.object is not None for entry in entries)
    assert issubclass(method.config.object, AnyRunConfig)
    assert method.arguments_field in {field.name for field in fields(method.config.object)}


@pytest.mark.parametrize("name", run_config_names())
def test_a_run_configuration_starts_from_the_index_of_its_method(name: str) -> None:
    config = load_run_config(compose_run_config(name))
    chain, files = name, []
    while not (CONFIG_ROOT / f"{chain}.yaml").exists():
        files.append(chain)
        defaults = yaml.safe_load((CONFIG_ROOT / "run_cfg" / f"{chain}.yaml").read_text())["defaults"]
        chain = next(word for word in defaults if isinstance(word, str) and word != "_self_").rpartition("/")[2]
        assert chain not in files
    assert chain == method_of(config).index
    assert type(config) is method_of(config).config.object
    assert isinstance(settings_of(config), PlanSettings)


def _questions(path: Path) -> Iterator[str]:
    """Calls of `isinstance` on a run configuration or a plan's settings, and comparisons of `method`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked, kind = map(ast.unparse, node.args)
            if re.search(r"RunConfig|Settings\b|config_class", kind) and _ABOUT_CONFIGS.search(asked + kind):
                yield ast.unparse(node)
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".method"):
            yield ast.unparse(node)


def test_the_class_of_a_configuration_is_asked_for_in_the_table_alone() -> None:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ("tests", ".venv", "results")]
    sources = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): list(_questions(path)) for path in sources}
    assert len(found) > 100
    asked = {name: questions for name, questions in found.items() if questions}
    assert asked == {"schemas/methods.py": ["isinstance(config, config_class)"]}


def test_a_configuration_of_another_kind_is_refused_where_a_teachers_is_needed() -> None:
    values = compose_run_config("llada_tiny")
    assert as_kind(load_run_config(values), RunConfig) is None
    with pytest.raises(ConfigError, match="`method` is masked_diffusion, and this is for a teacher's run"):
        load_teacher_config(values)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The table with one more method, and the configurations with its index and one run of it."""
    configs = tmp_path / "cfgs"
    shutil.copytree(CONFIG_ROOT, configs)
    (configs / "train_toy.yaml").write_text(toy_method.INDEX)
    (configs / "run_cfg" / "toy.yaml").write_text(toy_method.RUN)
    monkeypatch.setattr(schemas.compose, "CONFIG_ROOT", configs)
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    return tmp_path


def test_a_new_method_is_composed_validated_planned_and_verified(toy: Path) -> None:
    planned = plan_config("toy", int(8e9), ["learning_rate=1e-3"])
    assert type(planned.config) is toy_method.ToyRunConfig and planned.config.arguments.learning_rate == 1e-3
    assert planned.fits and planned.values["per_device_train_batch_size"] == 4
    assert "a toy; 4 toy rows; context 32" in repr(planned)
    choice = choose_batch_size(planned.config, int(8e9), "a GPU")
    assert tuple(choice) == (4, 1) and "4 toy rows per step" in choice.reason
    checks = [check_generator(planned.config), check_disk(planned.values, planned.plan), *check_models(planned.config)]
    assert all(check.status == "ok" for check in checks)
    assert json.dumps(planned.plan.to_dict()) and gb(planned.plan.max_bytes) < 1
    with pytest.raises(ConfigError, match="`row_lenght` is not a setting. Did you mean `row_length`"):
        plan_config("toy", int(8e9), ["row_lenght=3"])


def test_what_optimize_says_of_a_new_method_comes_from_its_entry(toy: Path) -> None:
    before = compose_run_config("toy", ["per_device_train_batch_size=1"])
    (use,) = settings_table(before, before | {"use_fp8": True}).columns[3].cells
    assert use == "nothing: a toy run has no generator and no frozen model of its own"


def test_a_new_method_runs(toy: Path) -> None:
    (run,) = train_runs([compose_run_config("toy", [f"output_dir={toy / 'run'}", "use_fp8=true"])])
    assert run.summary["loss"] == {"before": 2.0, "after": 1.0} and "toy loss" in repr(run)
    assert yaml.safe_load((toy / "run" / "config.yaml").read_text())["row_length"] == 32
