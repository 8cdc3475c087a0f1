"""Driver, compiler and headers: found before anything is installed or loaded, with a stand-in for nvidia-smi."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import gpu_software
from core.errors import UserError
from core.gpu_software import compiler_obstacle, driver_obstacle, driver_version
from preflight import readiness, verification
from preflight.hardware import check_hardware_and_plan
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config

ROOT = CONFIG_ROOT.parent


def program(folder: Path, name: str, text: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose programs are those that a test adds to `tmp_path / "bin"`, without a CUDA library."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_software, "_cuda_of_libcuda", lambda: 0)
    return folder


@pytest.mark.parametrize(
    ("driver", "cuda", "runs"),
    [
        ("580.65.06", 13, True),
        ("610.57", 13, True),
        ("575.57.08", 13, False),
        ("470.256.02", 13, False),
        ("575.57.08", 12, True),
        ("470.256.02", 12, False),
        ("[N/A]", 13, True),
        (None, 13, True),
    ],
)
def test_the_branch_of_the_driver_decides(driver, cuda, runs, machine):
    obstacle = driver_obstacle(driver, cuda)
    assert (obstacle is None) == runs
    assert runs or f"{driver}" in str(obstacle) and f"CUDA {cuda}" in str(obstacle)


def test_compatibility_libraries_make_up_for_an_old_driver(machine, monkeypatch):
    monkeypatch.setattr(gpu_software, "_cuda_of_libcuda", lambda: 13)
    assert driver_obstacle("550.54.15", 13) is None


def test_the_driver_is_nvidia_smis(machine):
    assert driver_version() is None
    program(machine, "nvidia-smi", "echo 570.86.15; echo 570.86.15")
    assert driver_version() == "570.86.15"
    program(machine, "nvidia-smi", "echo no devices; exit 9")
    assert driver_version() is None


def test_a_compiler_is_cc_gcc_or_clang_and_python_brings_its_headers(machine, tmp_path, monkeypatch):
    headers = tmp_path / "include"
    monkeypatch.setattr(gpu_software.sysconfig, "get_paths", lambda scheme: {"include": str(headers)})
    assert "gcc or clang" in str(compiler_obstacle())
    program(machine, "clang")
    assert "no Python.h" in str(compiler_obstacle()) and "-dev" in str(compiler_obstacle())
    headers.mkdir()
    (headers / "Python.h").touch()
    assert compiler_obstacle() is None
    monkeypatch.setenv("CC", "icx")
    assert "icx" in str(compiler_obstacle())
    program(machine, "icx")
    assert compiler_obstacle() is None
    monkeypatch.setenv("CPATH", f"/nowhere:{headers}")
    monkeypatch.setattr(gpu_software.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    assert compiler_obstacle() is None


@pytest.mark.parametrize(
    ("driver", "has_compiler", "refused"), [("570.86.15", True, "NVIDIA driver 570.86.15"), ("580.65.06", False, "gcc")]
)
def test_the_set_up_installs_nothing_on_such_a_machine(driver, has_compiler, refused, machine, tmp_path):
    """Of a copy of the project; standard library only (`-S` hides the packages)."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    (project / "core").mkdir()
    for name in ("scripts/setup_env.py", "pyproject.toml", "constraints.txt", "core/__init__.py"):
        shutil.copy(ROOT / name, project / name)
    for name in ("errors", "gpu_software", "one_gpu"):
        shutil.copy(ROOT / f"core/{name}.py", project / f"core/{name}.py")
    program(machine, "nvidia-smi", f"echo {driver}")
    if has_compiler:
        program(machine, "gcc")
    command = [sys.executable, "-S", str(project / "scripts/setup_env.py")]
    environment = {"PATH": str(machine)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and refused in done.stderr and "remedy" in done.stderr, done.stderr
    assert not (project / ".venv").exists()


def cuda_build(monkeypatch, *, sees_gpu):
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(sees_gpu))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def config_of(*words):
    return load_run_config(compose_run_config("teacher_rlt_tiny", list(words)))


def test_a_run_is_refused_rather_than_put_on_the_cpu_for_an_old_driver(machine, monkeypatch):
    cuda_build(monkeypatch, sees_gpu=False)
    program(machine, "nvidia-smi", "echo 570.86.15")
    for device_map in ("auto", "cuda:0"):
        with pytest.raises(UserError, match="driver 570"):
            check_hardware_and_plan(config_of(f"model_args.device_map={device_map}"))
    assert check_hardware_and_plan(config_of("model_args.device_map=cpu"))[1].type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert check_hardware_and_plan(config_of())[1].type == "cpu"


def test_a_run_that_needs_triton_needs_a_compiler(machine, monkeypatch):
    cuda_build(monkeypatch, sees_gpu=True)
    monkeypatch.setattr("preflight.hardware.is_installed", lambda package: True)
    for words in (["generator=auto"], ["generator=transformers", "compile_models=true"]):
        with pytest.raises(UserError, match="no program gcc or clang"):
            check_hardware_and_plan(config_of(*words))
    try:
        assert check_hardware_and_plan(config_of("generator=transformers"))[1].type == "cuda"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_the_check_before_a_run_says_both(machine, monkeypatch, capsys):
    monkeypatch.setattr(readiness, "_torch_cuda_version", lambda: "13.0")
    monkeypatch.setattr(readiness, "_hub_check", lambda: readiness.Check(name="hub", status="ok", detail="answers"))
    program(machine, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4'")
    assert verification.main([]) == 1
    said = capsys.readouterr().out
    assert "NVIDIA driver 570.86.15" in said and "gcc or clang" in said and "apt-get" in said
    program(machine, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4'")
    program(machine, "gcc")
    monkeypatch.setattr(gpu_software.sysconfig, "get_paths", lambda scheme: {"include": str(machine)})
    (machine / "Python.h").touch()
    verification.main([])
    said = capsys.readouterr().out
    assert "NVIDIA driver" not in said and "for Triton" in said
