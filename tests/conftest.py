import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py sets it, before torch is loaded

import pytest
import torch

from core.log import configure_logging
from tests.helpers.own_process import pytest_runtest_logreport, pytest_runtest_protocol  # noqa: F401 - hooks

configure_logging()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process where there is a GPU, whose memory is measured, or where a test's prints are to be seen (-s)."""
    alone = torch.cuda.is_available() or config.option.capture == "no"
    return 0 if alone else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
