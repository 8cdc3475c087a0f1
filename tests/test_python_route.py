"""rlt.py: no side effects, the command line's settings and messages, results that a notebook shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import rlt
from core.errors import UserError
from core.process import prepare_process
from planner.plan import plan_run
from schemas.compose import CONFIG_ROOT, compose_run_config, setting_words
from schemas.run import ConfigError, load_run_config
from scripts import setup_env

ROOT = CONFIG_ROOT.parent

_IMPORT = """
import json, logging, os, sys, warnings
before = sys.argv[:], dict(os.environ), logging.root.handlers[:], logging.root.level, warnings.filters[:], os.getcwd()
import rlt
after = sys.argv[:], dict(os.environ), logging.root.handlers[:], logging.root.level, warnings.filters[:], os.getcwd()
unchanged = [old == new for old, new in zip(before, after)]
heavy = [name for name in ("torch", "vllm", "transformers", "trl", "datasets", "pandas") if name in sys.modules]
print(json.dumps({"unchanged": unchanged, "handlers": len(logging.getLogger("rlt").handlers), "heavy": heavy}))
"""


def run_python(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = ":".join(map(str, (*paths, ROOT)))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def test_importing_it_changes_nothing_and_loads_no_torch(tmp_path):
    done = run_python(_IMPORT, tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout) == {"unchanged": [True] * 6, "handlers": 0, "heavy": []}
    assert not list(tmp_path.iterdir())


def test_another_package_of_the_same_name_in_front_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("")
    done = run_python("import rlt", tmp_path)
    assert done.returncode == 1
    assert f"`models` is imported from {tmp_path}/models/__init__.py" in done.stderr and str(ROOT) in done.stderr


VALUES = [
    *(True, False, None, 0, -3, 1e-4, 2.5e-7, "", "a b", "a'b", 'a"b', "back\\slash", "end\\", "\\'", "x\\\\'", "null"),
    *("3", "1e-4", "[1,2]", "{a: 1}", "a=b,c", "é 漢\n", " padded ", "~/my data/x.jsonl", "%d", "#", "@", "+x", "~x"),
    *([], [1.0, 0.01], ["a b", None, [True]], {}, {"num_cycles": 2, "name": "it's"}),
]


def test_every_python_value_arrives_as_it_was_given():
    settings = {f"key_{i}": value for i, value in enumerate(VALUES)}
    values = compose_run_config("teacher_rlt_tiny", setting_words(settings))
    for key, value in settings.items():
        assert values[key] == value and type(values[key]) is type(value), (key, value)


def test_values_of_other_types_are_said_as_the_nearest_that_a_command_line_knows():
    words = setting_words({"a": (1, 2), "b": Path("/x y"), "c": np.float32(0.5), "d": np.int64(3)})
    assert words == ["a=[1,2]", "b='/x y'", "c=0.5", "d=3"]
    with pytest.raises(TypeError, match="settings are numbers"):
        setting_words({"a": object()})


def test_sections_groups_and_file_names_are_those_of_the_command_line():
    words = ["model_cfg=qwen25_7b_nf4", "model_args.lora_r=8", "model_args.lora_alpha=4", "learning_rate=1e-4"]
    expected = compose_run_config("teacher_rlt_tiny", words)
    args = {"lora_r": 8, "lora_alpha": 4}
    settings = {"model_cfg": "qwen25_7b_nf4", "model_args": args, "learning_rate": 1e-4}
    dotted = {"model_cfg": "qwen25_7b_nf4", "model_args.lora_r": 8, "model_args.lora_alpha": 4, "learning_rate": 1e-4}
    for given in (settings, dotted):
        assert compose_run_config("teacher_rlt_tiny", setting_words(given)) == expected
    for name in ("teacher_rlt_tiny", "teacher_rlt_tiny.yaml", "cfgs/run_cfg/teacher_rlt_tiny.yaml"):
        assert rlt.plan(name).name == "teacher_rlt_tiny"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("max_stepz=3", {"max_stepz": 3}),
        ("train_batch_size=63", {"train_batch_size": 63}),
        ("model_cfg=nope", {"model_cfg": "nope"}),
        ("dataset_id_or_path=./missing.jsonl", {"dataset_id_or_path": "./missing.jsonl"}),
    ],
)
def test_a_mistake_is_an_exception_with_the_text_of_the_command_line(word, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, UserError)) as raised:
        rlt.train("teacher_rlt_tiny", **settings)
    command = [sys.executable, str(ROOT / "train.py"), "--config-name=teacher_rlt_tiny", word]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2

    def text(message: str) -> str:  # the two entries name Hydra's own search path in different words
        return " ".join(line for line in message.splitlines() if "provider=" not in line)

    assert " ".join(text(str(raised.value)).split()) in " ".join(text(done.stdout).split())
    assert not (tmp_path / "results").exists()


def test_a_plan_is_that_of_the_run_and_shows_itself():
    shown = rlt.plan("teacher_rlt_mono_85gb", gpu_gb=24, max_completion_length=4096)
    words = ["max_completion_length=4096", "gpu_gb=24"]
    plan = plan_run(load_run_config(compose_run_config("teacher_rlt_mono_85gb", words)), int(24e9))
    assert shown.plan == plan and not shown.fits
    text, html = repr(shown), shown._repr_html_()
    for word in ("load", "generate", "score", "train", "sync", "does not fit a GPU of 24.0 GB", "KV cache"):
        assert word in text and word in html
    assert html.startswith("<pre") and html.endswith("</pre>") and "\x1b" not in text
    assert rlt.plan("teacher_rlt_mono_85gb", gpu_gb=85).fits


def test_a_program_that_uses_hydra_itself_keeps_its_own():
    with initialize_config_dir(config_dir=str(CONFIG_ROOT), version_base="1.3"):
        own = GlobalHydra.instance().hydra
        rlt.plan("teacher_rlt_tiny")
        assert GlobalHydra.instance().hydra is own
        compose(config_name="train", overrides=["run_name=own"])


def test_the_environment_is_prepared_where_torch_is_not_there_yet(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert not prepare_process()  # torch is loaded in this process
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert prepare_process()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["TORCH_CPP_LOG_LEVEL"]) == ("PASSIVE", "INFO")


def test_the_runs_gpu_is_chosen_before_anything_is_loaded(monkeypatch):
    def choose(runs):
        raise UserError(str(runs[0]["model_args"]["device_map"]), expected="", remedy="")

    monkeypatch.setattr(rlt, "show_one_gpu", choose)
    with pytest.raises(UserError, match="cuda:3"):
        rlt.train("teacher_rlt_tiny", model_args={"device_map": "cuda:3"})


def test_the_environments_python_finds_the_checkout_and_follows_it(tmp_path):
    site_packages = tmp_path / "lib/python3.11/site-packages"
    site_packages.mkdir(parents=True)
    for checkout in (tmp_path / "old place", ROOT):
        setup_env.make_importable(tmp_path, checkout)
        assert [file.read_text() for file in site_packages.iterdir()] == [f"{checkout}\n"]
    code = f"import site; site.addsitedir({str(site_packages)!r}); import rlt; print(rlt.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(ROOT / "rlt.py"), done.stderr


@pytest.mark.parametrize("options", [(), ("-e",)], ids=["plain", "editable"])
def test_installing_is_refused_in_one_sentence(options, tmp_path):
    for name in ("pyproject.toml", "README.md", "scripts/refuse_build.py"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *options, str(tmp_path / "checkout")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert "run ./launch_mono.sh in the checkout once" in done.stderr and "Traceback" not in done.stderr
