"""What a GPU machine does with tests that start an engine, with a stand-in for the GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.compose import CONFIG_ROOT

ROOT = CONFIG_ROOT.parent

_CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.cuda.is_available = lambda: {{gpu}}
from tests.helpers.own_process import pytest_runtest_logreport, pytest_runtest_protocol

def pytest_configure(config):
    config.addinivalue_line("markers", "engine: starts an engine")
"""

_TESTS = """
import os
import pytest

pytestmark = pytest.mark.engine
started = []

def start():
    assert not started, "a second engine in this process"
    started.append(os.getpid())

@pytest.fixture(scope="module")
def generator():
    start()
    yield started
    open("closed", "a").write("x")

def test_shares_one(generator): pass

@pytest.mark.parametrize("number", [1, 2])
def test_own(number):
    start()
    print("said by the engine")

def test_shares_another(generator): pass

@pytest.mark.skip(reason="not here")
def test_skipped(): pass

def test_fails():
    start()
    assert 1 == 2, "the difference"

def test_crashes():
    print("before the crash", flush=True)
    os._exit(7)
"""


def run(folder: Path, *words: str, gpu: bool = True) -> str:
    (folder / "conftest.py").write_text(_CONFTEST.format(gpu=gpu))
    (folder / "test_engines.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-n", "0", "--rootdir", str(folder), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
def test_each_engine_gets_a_process_of_its_own_and_its_outcome_is_reported(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert re.search(r"2 failed, 4 passed, 1 skipped", output), output
    assert "the difference" in output and "not here" in output and "said by the engine" in output
    assert "process ended with status 7" in output and "before the crash" in output
    assert (tmp_path / "closed").read_text() == "x"  # the two that share an engine shared a process


@pytest.mark.slow
def test_without_a_gpu_they_run_where_they_are(tmp_path: Path) -> None:
    output = run(tmp_path, "-k", "own or fails", gpu=False)
    assert re.search(r"2 failed, 1 passed", output) and "a second engine" in output, output
