"""test_config_85gb.py as a command: exit status, plan, remedies."""

import json
import sys
from pathlib import Path

import pytest

from core.gpu import Gpu, find_gpu
from planner.plan import plan_run
from planner.planned import plan_config
from preflight import readiness, verification
from preflight.readiness import check_disk, check_gpu, check_loggers, check_packages
from schemas.compose import CONFIG_ROOT, compose_run_config, run_config_names
from schemas.run import load_run_config
from tests.helpers.command import run_command

SCRIPT = CONFIG_ROOT.parent / "test_config_85gb.py"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "find_gpu", lambda: None)
    monkeypatch.setattr(readiness, "_hub_check", lambda: readiness.Check(name="hub", status="ok", detail="answers"))


def test_ready_in_under_ten_seconds_from_another_directory(tmp_path: Path) -> None:
    done = run_command(sys.executable, SCRIPT, cwd=tmp_path)
    assert done.status == 0, done.text
    assert done.cpu_s < 10  # not the clock's: the machine may be busy
    for word in ("load", "generate", "score", "train", "sync", "teacher_rlt_mono_85gb", "ready"):
        assert word in done.text


def test_a_small_card_gets_the_binding_phase_and_a_command_that_fits(no_gpu: None, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert verification.main(["--gpu-gb", "24", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    check = next(check for check in result["checks"] if check["name"] == "memory plan")
    assert check["status"] == "failure" and "train phase" in check["detail"]
    words = check["remedy"].split()
    assert words[:2] == ["./launch_mono.sh", "teacher_rlt_mono_85gb"]
    fitting = load_run_config(compose_run_config(words[1], words[2:]))
    assert plan_run(fitting, int(24e9)).fits()


def test_all_plans_every_run_configuration(no_gpu: None, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    assert verification.main(["--all", "--json", str(file)]) == 0
    assert sorted(json.loads(file.read_text())["plans"]) == run_config_names()


@pytest.mark.parametrize(
    "words",
    [
        ["--config-name", "nope"],
        ["--gpu-gb", "-3"],
        ["--gpu-gb", "many"],
        ["--gpu-gb", "nan"],
        ["--gpu-gb", "inf"],
        ["--json", "/no/such/folder/x.json"],
        ["--what"],
    ],
)
def test_a_wrong_call_is_status_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        verification.main(words)
    assert stopped.value.code == 2


def test_a_config_may_be_named_by_its_file(no_gpu: None) -> None:
    assert verification.main(["--config-name", "cfgs/run_cfg/teacher_rlt_tiny.yaml"]) == 0


def test_missing_and_old_packages_come_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    version = readiness.importlib.metadata.version

    def installed(name: str) -> str:
        if name == "peft":
            raise readiness.importlib.metadata.PackageNotFoundError(name)
        return "1.0.0" if name == "trl" else version(name)

    monkeypatch.setattr(readiness.importlib.metadata, "version", installed)
    failures = {check.detail.split()[0]: check.remedy for check in check_packages() if check.status == "failure"}
    assert failures.keys() == {"peft", "trl"}
    assert failures["trl"] == 'pip install "trl==1.16.0"'


def test_gpu_checks_compare_free_memory_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_config("teacher_rlt_mono_85gb", int(85e9)).plan
    monkeypatch.setattr(readiness, "_torch_cuda_version", lambda: "13.0")
    free = Gpu(name="GPU", driver="580", total_bytes=int(85e9), used_bytes=0)
    taken = Gpu(name="GPU", driver="580", total_bytes=int(85e9), used_bytes=int(60e9))
    assert all(check.status == "ok" for check in check_gpu(free, plan))
    assert [check.name for check in check_gpu(taken, plan) if check.status == "failure"] == ["free memory"]
    assert [check.status for check in check_gpu(None, plan)] == ["warning"]
    monkeypatch.setattr(readiness, "_torch_cuda_version", lambda: None)
    assert [check.name for check in check_gpu(free, plan) if check.status == "failure"] == ["CUDA"]


def test_nvidia_smi_is_read_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.65, 81559, 4'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = find_gpu()
    assert gpu == Gpu(name="NVIDIA H100 80GB HBM3", driver="580.65", total_bytes=81559 * 2**20, used_bytes=4 * 2**20)
    monkeypatch.setenv("PATH", "")
    assert find_gpu() is None


def test_a_full_disk_and_a_missing_login_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned = plan_config("teacher_rlt_mono_85gb", int(85e9))
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert check_disk(planned.values, planned.plan).status == "failure"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = load_run_config({**planned.values, "report_to": "wandb"})
    assert check_loggers(config).status == "warning"
    assert check_loggers(planned.config).status == "ok"
