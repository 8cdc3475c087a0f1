"""Tests that start a vLLM engine, each in a process of its own where there is a GPU: hooks for a conftest.

vLLM's sleep mode allows one engine in a process (its allocator refuses a second), so tests marked `engine` cannot
share pytest's process on a GPU. Such a test is run by a second pytest, whose reports are handed on as if it had run
here. Tests that share the module fixture `generator`, which is one engine, share one process. On a CPU the marker has
no effect.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPORT_FILE = "RLT_TEST_REPORT_FILE"
"""Environment variable of the second pytest: where it writes its reports, one JSON object per line."""
_SHARED_ENGINE = "generator"
_reports: dict[str, list[pytest.TestReport]] = {}
"""Reports of the tests that ran elsewhere and were not handed on yet, by node id."""


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if "engine" not in item.keywords or REPORT_FILE in os.environ or not torch.cuda.is_available():
        return None
    if item.nodeid not in _reports:
        _run_elsewhere(item.config, _same_process(item))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports.pop(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORT_FILE in os.environ:
        with Path(os.environ[REPORT_FILE]).open("a") as file:
            file.write(json.dumps(report._to_json(), default=str) + "\n")


def _same_process(item: pytest.Item) -> list[pytest.Item]:
    """`item`, and where it uses the shared engine all chosen tests of its module that do."""
    if _SHARED_ENGINE not in _fixtures(item):
        return [item]
    return [other for other in item.session.items if other.path == item.path and _SHARED_ENGINE in _fixtures(other)]


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def _run_elsewhere(config: pytest.Config, items: list[pytest.Item]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports.jsonl"
        node_ids = [item.nodeid for item in items]
        # Shown as well as captured, so that what was said before a crash is not lost.
        options = ["-p", "no:cacheprovider", "-n", "0", "-m", "", "--capture=tee-sys"]
        command = [sys.executable, "-m", "pytest", *options, *node_ids]
        environment = os.environ | {REPORT_FILE: str(file)}
        done = subprocess.run(command, cwd=config.rootpath, env=environment, capture_output=True, text=True)
        lines = file.read_text().splitlines() if file.exists() else []
    for item in items:
        _reports[item.nodeid] = []
    for line in lines:
        report = pytest.TestReport._from_json(json.loads(line))
        if isinstance(report.longrepr, list):  # where and why a test was skipped: a tuple, which JSON does not have
            report.longrepr = tuple(report.longrepr)  # type: ignore[assignment]
        _reports[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in _reports[item.nodeid]):
            _reports[item.nodeid].append(_lost(item, done))


def _lost(item: pytest.Item, done: "subprocess.CompletedProcess[str]") -> pytest.TestReport:
    said = done.stdout[-3000:] + done.stderr[-3000:]
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the test's own process ended with status {done.returncode}\n{said}",
        when="call",
    )
