"""Part b: the tests that need a GPU, and vLLM's, each engine in a process of its own (tests/conftest.py)."""

import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

from benchmarks.gpu.cell import Setup, SkipCell, require_cuda
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.runner import Figures

_ALL_PASSED, _SOME_FAILED, _NO_TESTS_CHOSEN = 0, 1, 5


def run_tests(setup: Setup, figures: Figures) -> None:
    """`pytest -m EXPRESSION`; without a GPU those that need one are collected and skip themselves."""
    if setup.arguments["needs_cuda"]:
        require_cuda()
    report = setup.scratch / f"{setup.cell}.xml"
    options = ["-n", "0", "-v", "-rs", "--durations=10", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, "-m", setup.arguments["expression"]]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status == _NO_TESTS_CHOSEN:
        raise SkipCell(f"no test is marked {setup.arguments['expression']}")
    if status not in (_ALL_PASSED, _SOME_FAILED):
        raise RuntimeError(f"pytest ended with status {status}: it was interrupted or could not start")
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = Counter(_outcome(case) for case in cases)
    reasons = Counter(skip.get("message", "") for case in cases for skip in case.iter("skipped"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if _outcome(case) == "failed"]
    figures.update(outcomes=outcomes, failed=failed, skip_reasons=reasons)
    rows = [[outcome, str(count)] for outcome, count in outcomes.items()]
    rows += [[f"skipped: {reason}", str(count)] for reason, count in reasons.items()]
    figures.add_table(f'pytest -m "{setup.arguments["expression"]}"', ("outcome", "tests"), rows)
    if failed:
        raise RuntimeError(f"{len(failed)} failed: {', '.join(failed)}")
    if not outcomes["passed"]:
        raise SkipCell("; ".join(reasons))


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
