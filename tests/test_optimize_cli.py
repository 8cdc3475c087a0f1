"""./optimize.sh: flags, what they print, and the training command that they become."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from optimization import cli
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.optimization import TrainingOptimizationConfig
from schemas.run import load_run_config

ROOT = CONFIG_ROOT.parent
FLAGS = [f"--{name.replace('_', '-')}" for name in cli.GROUPS] + [
    *("--all", "--auto-batch", "--stats", "--setup-only", "--train", "--model", "--size", "--output-dir", "--help")
]
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the tool; (status, what it printed, the command that it turned into)."""
    monkeypatch.setattr(cli.console, "width", 300)

    def call(*words):
        commands = []
        monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
        try:
            status = cli.main(list(words))
        except SystemExit as end:
            status = end.code
        output = capsys.readouterr()
        return status, output.out + output.err, commands[0] if commands else None

    return call


def values(name):
    return yaml.safe_load((CONFIG_ROOT / "optimization_cfg" / f"{name}.yaml").read_text())


def test_help_lists_every_flag(run):
    assert {"--memory", "--cuda", "--fp8", "--attention", "--flash-attention", "--prealloc"} < set(FLAGS)
    assert {"--compile", "--recover-nan"} < set(FLAGS)
    status, text, _ = run("--help")
    assert status == 0 and all(flag in text for flag in FLAGS)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--nonsense", "nonsense"),
        ("--mem", "mem"),
        ("--model", "model"),
        ("teacher_rlt_nope", "teacher_rlt_nope"),
        ("max_stepz=3", "max_stepz"),
        ("max_steps=[1", "[1"),
        ("data_cfg=nope", "data_cfg/nope"),
    ],
)
def test_a_wrong_word_is_a_message_and_status_2(word, named, run):
    status, text, command = run(word)
    assert status == 2 and named in text and command is None


@no_gpu_here
@pytest.mark.parametrize("words", [["--all"], ["--memory", "--cuda"]])
def test_without_train_it_says_what_would_change_what_it_gives_and_what_does_not_apply(words, run):
    status, text, command = run(*words)
    assert status == 0 and command is None
    assert "mlp_tile_tokens" in text and "train -" in text and "GB" in text
    assert "torch sees no CUDA device" in text and "./launch_mono.sh teacher_rlt_tiny" in text


@no_gpu_here
def test_auto_batch_prints_batch_and_accumulation(run):
    status, text, _ = run("--auto-batch", "--model", "qwen2.5", "--size", "7b", "gpu_gb=85")
    assert status == 0
    batch, accumulation = (int(text.split(word)[1].split()[0].strip(":,")) for word in ("batch ", "accumulation "))
    assert batch * accumulation == 64 and "predicted peak" in text


def test_train_becomes_a_train_py_call_with_the_settings_and_the_users_words_last(run):
    status, _, command = run("--recover-nan", "--compile", "--train", "max_steps=3", "--output-dir", "here", "seed=5")
    assert command[1:3] == [str(ROOT / "train.py"), "--config-name=teacher_rlt_tiny"]
    assert command[3:] == ["output_dir=here", "compile_models=true", "recover_from_nan=true", "max_steps=3", "seed=5"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--model", "qwen2.5", "--size", "0.5b"], "Qwen/Qwen2.5-0.5B-Instruct"),
        (["--model", "llama", "--size", "8b"], "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_model_and_size_choose_the_teacher(words, name, run):
    _, _, command = run(*words, "--train")
    config = load_run_config(compose_run_config("teacher_rlt_mono_85gb", command[3:]))
    assert config.model_name_or_path == name and config.student_model is None


def test_a_run_configuration_can_be_named(run):
    _, _, command = run("teacher_rlt_mono_24gb.yaml", "--memory", "--train")
    assert command[2] == "--config-name=teacher_rlt_mono_24gb"


def test_each_flag_is_a_file_and_all_is_their_sum(run):
    _, _, command = run("--all", "--train")
    everything = {key: value for name in cli.GROUPS for key, value in values(name).items()}
    composed = compose_run_config("train", ["optimization_cfg=all"])
    assert {key: composed[key] for key in everything} == everything
    assert set(values("all")["defaults"]) == {*cli.GROUPS, "_self_"}
    words = dict(word.split("=") for word in command[3:])
    assert (
        words
        | {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in everything.items()}
        == words
    )


def test_every_switch_of_the_schema_is_on_in_all():
    composed = load_run_config(compose_run_config("train", ["optimization_cfg=all"]))
    switches = [field.name for field in dataclasses.fields(TrainingOptimizationConfig) if field.default is False]
    assert len(switches) >= 8 and all(getattr(composed, name) for name in switches)


@pytest.mark.parametrize("path", sorted((CONFIG_ROOT / "optimization_cfg").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_optimization_file_makes_a_valid_run(path):
    load_run_config(compose_run_config("train", [f"optimization_cfg={path.stem}"]))


@pytest.fixture
def clone(tmp_path):
    """The repository as optimize.sh sees it, its environment being the one that runs the tests."""
    for name in ("schemas", "core", "data", "planner", "optimization", "models", "generation", "rewards", "trainers"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("cfgs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "optimize.sh", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup_env.py").write_text("open('set_up', 'w').close()\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def shell(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder = clone / "elsewhere"
    folder.mkdir(exist_ok=True)
    return subprocess.run([clone / "optimize.sh", *words], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_script_sets_up_passes_its_words_on_and_keeps_the_folder(clone):
    done = shell(clone, "--auto-batch", "--memory")
    assert done.returncode == 0, done.stderr
    assert "batch " in done.stdout and (clone / "elsewhere" / "set_up").exists()
    assert shell(clone, "--nonsense").returncode == 2


@pytest.mark.slow
def test_the_script_trains_three_steps(clone):
    done = shell(clone, "--recover-nan", "--compile", "--train", "max_steps=3", "--output-dir", "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the model is on a CPU, where compiling" in done.stdout  # why the student is not compiled
    assert (clone / "elsewhere" / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("word", "said"), [("--setup-only", "the environment is ready"), ("--stats", "GPU: ")])
def test_set_up_and_stats_train_nothing(word, said, run):
    status, text, command = run(word)
    assert status == 0 and said in text and command is None
