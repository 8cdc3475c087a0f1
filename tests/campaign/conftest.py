"""The lab that the campaigns share, their tallies, and the table at the end."""

import os
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.campaign.lab import Lab
from tests.campaign.tally import Tally, append_record, table_of

ROOT = Path(__file__).parents[2]
_records: list[dict[str, Any]] = []


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """`CAMPAIGN_SEED` chooses moments, files and values; `CAMPAIGN_SCALE` multiplies the trials; `CAMPAIGN_JOBS` run at
    a time."""
    return Lab(
        tmp_path_factory.mktemp("campaign"),
        seed=int(os.environ.get("CAMPAIGN_SEED", "0")),
        scale=float(os.environ.get("CAMPAIGN_SCALE", "1")),
        jobs=int(os.environ.get("CAMPAIGN_JOBS", str(min(4, os.cpu_count() or 1)))),
    )


@pytest.fixture
def tally(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Tally]:
    """Counts of one campaign; written to `CAMPAIGN_RESULTS`, and the test fails on any loss."""
    tally = Tally(request.node.callspec.id)
    yield tally
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {"date": date.today().isoformat(), "commit": commit.stdout.strip(), "seed": lab.seed, "scale": lab.scale}
    record = facts | tally.record()
    _records.append(record)
    if "campaign" in request.keywords:
        append_record(Path(os.environ.get("CAMPAIGN_RESULTS", ROOT / "results" / "campaign.jsonl")), record)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _records:
        console = Console(file=terminalreporter._tw._file, width=120)
        console.print(table_of(_records))
