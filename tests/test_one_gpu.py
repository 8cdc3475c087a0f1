"""One process, one GPU: which one it is, and that the others are hidden in time, with two fake GPUs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import one_gpu
from core.errors import UserError
from core.gpu import find_gpu
from core.one_gpu import show_one_gpu
from optimization.gpu import pick_device
from preflight.hardware import check_hardware_and_plan
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config
from trainers.grpo_args import build_grpo_args

ROOT = CONFIG_ROOT.parent
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RLT_ONE_GPU", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were not loaded yet, in an environment that says nothing about GPUs."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the code under test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(one_gpu, "sys", SimpleNamespace(modules={}))


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, of which torch counts those that its own reading of the environment leaves."""
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: len([n for n in torch.cuda._parse_visible_devices() if n < 2])
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def run_on(device_map: str | None) -> dict:
    return {"model_args": {"device_map": device_map}}


@pytest.mark.parametrize(
    ("visible", "device_map", "left"),
    [
        (None, "auto", "0"),
        (None, None, "0"),
        (None, "cuda", "0"),
        (None, "cuda:1", "1"),
        ("2,3", "auto", "2"),
        ("2,3", "cuda:1", "3"),
        (" 2 , 3 ", "cuda:1", "3"),
        ("GPU-aaaa,GPU-bbbb", "cuda:1", "GPU-bbbb"),
        ("MIG-aaaa", "auto", "MIG-aaaa"),
        ("1,-1,0", "cuda", "1"),
        ("0,1", "cpu", "0,1"),
        ("0,1", "banana", "0,1"),
        ("", "auto", ""),
        ("-1", "auto", "-1"),
    ],
)
def test_the_one_that_is_left(visible, device_map, left, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show_one_gpu([run_on(device_map)])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    show_one_gpu([run_on(device_map)])  # as in a child process
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize("device_map", ["auto", "cuda", "cuda:1"])
def test_torch_then_counts_one_and_the_batch_is_that_of_the_configuration(device_map, two_cards):
    config = load_run_config(compose_run_config("teacher_rlt_tiny"))
    assert build_grpo_args(config, use_cpu=False).train_batch_size == 2 * config.train_batch_size
    show_one_gpu([run_on(device_map)])
    assert build_grpo_args(config, use_cpu=False).train_batch_size == config.train_batch_size
    assert pick_device(device_map if device_map != "auto" else "cuda") == torch.device("cuda:0")


def test_numbers_are_nvidia_smis_where_the_user_set_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    show_one_gpu([run_on("auto")])
    assert "CUDA_DEVICE_ORDER" not in os.environ  # the user's numbers keep their meaning
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_one_gpu([run_on("auto")])
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_later_choice_of_the_user_counts(monkeypatch):
    show_one_gpu([run_on("cuda:1")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    show_one_gpu([run_on("cuda:1")])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_what_cannot_be_shown_is_refused(monkeypatch):
    with pytest.raises(UserError, match="a sweep over cuda:0, cuda:1"):
        show_one_gpu([run_on("auto"), run_on("cuda:1")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match="cuda:2 with CUDA_VISIBLE_DEVICES=4,5"):
        show_one_gpu([run_on("cuda:2")])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_once_torch_is_loaded_it_is_too_late_and_several_gpus_are_refused(monkeypatch, two_cards):
    monkeypatch.setattr(one_gpu, "sys", SimpleNamespace(modules={"torch": torch}))
    show_one_gpu([run_on("auto")])
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    config = load_run_config(compose_run_config("teacher_rlt_tiny", ["model_args.device_map=cuda:1"]))
    with pytest.raises(UserError, match="2 GPUs that this process sees"):
        check_hardware_and_plan(config)


def test_a_launchers_processes_keep_theirs(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    show_one_gpu([run_on("auto")])
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_check_before_a_run_looks_at_the_same_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-b*) echo "B, 580, 2, 1";; *) echo "A, 580, 1, 0";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpu().name == "A"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    assert find_gpu().name == "B"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find_gpu() is None


_UP_TO_TORCH = """
import os, runpy, sys

class AtTheImportOfTorch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ["CUDA_VISIBLE_DEVICES"])
            sys.exit()

sys.meta_path.insert(0, AtTheImportOfTorch())
"""
_BY_COMMAND = """
sys.argv = ["train.py", "--config-name=teacher_rlt_tiny", "model_args.device_map=cuda:1"]
runpy.run_path(ROOT + "/train.py", run_name="__main__")
"""
_FROM_PYTHON = """
import rlt
rlt.train("teacher_rlt_tiny", model_args={"device_map": "cuda:1"})
"""


@pytest.mark.parametrize("call", [_BY_COMMAND, _FROM_PYTHON], ids=["train.py", "rlt.train"])
def test_the_others_are_hidden_before_torch_is_loaded(call: str, tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"ROOT = {str(ROOT)!r}{_UP_TO_TORCH}{call}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["GPU-b"], done.stderr


def test_one_module_asks_torch_which_gpu_there_is_and_what_it_can_do() -> None:
    question = re.compile(r"torch\.cuda\.(is_available|device_count|get_device_|is_bf16_supported)")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    folders = [ROOT / name for name in (*packages, "benchmarks", "examples", "scripts")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    asking = {str(file.relative_to(ROOT)) for file in files if question.search(file.read_text())}
    assert asking == {"optimization/gpu.py"}
