"""Nothing is lost: every fault tried, survived and counted. `make campaign` runs all of it, the tests a sample."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.campaign import (
    configurations,
    damage,
    disk_full,
    errors,
    kills,
    long_run,
    shared_folder,
    signals,
    surroundings,
)
from tests.campaign.lab import DIFFUSION, STUDENT, TRANSFORMERS, VLLM, WARM_UP, Lab, Program, differences
from tests.campaign.tally import Tally


@dataclass(frozen=True)
class Campaign:
    """`count` faults of the full campaign at scale 1, `sample` of them in the tests."""

    name: str
    try_all: Callable[[Lab, Tally, Program, int], None]
    program: Program
    count: int
    sample: int = 0

    @property
    def parameter(self) -> object:
        needs_vllm = self.program is VLLM and importlib.util.find_spec("vllm") is None
        marks = [pytest.mark.skip(reason="vLLM is not installed")] if needs_vllm else []
        return pytest.param(self, id=f"{self.name}, {self.program.name}", marks=marks)


CAMPAIGNS = [
    Campaign("kills", kills.kill_and_continue, TRANSFORMERS, 80, sample=4),
    Campaign("kills", kills.kill_and_continue, VLLM, 24),
    Campaign("kills", kills.kill_and_continue, DIFFUSION, 24),
    Campaign("kills", kills.kill_and_continue, STUDENT, 24, sample=6),
    Campaign("kills", kills.kill_and_continue, WARM_UP, 24, sample=6),
    Campaign("damaged files", damage.damage_and_continue, TRANSFORMERS, 48, sample=4),
    Campaign("damaged files", damage.damage_and_continue, DIFFUSION, 24),
    Campaign("full disks", disk_full.fill_and_continue, TRANSFORMERS, 14, sample=2),
    Campaign("full disks", disk_full.fill_and_continue, VLLM, 4),
    Campaign("full disks", disk_full.fill_and_continue, DIFFUSION, 8),
    Campaign("thrown errors", errors.throw_and_continue, TRANSFORMERS, 30, sample=3),
    Campaign("thrown errors", errors.throw_and_continue, VLLM, 4),
    Campaign("thrown errors", errors.throw_and_continue, DIFFUSION, 12),
    Campaign("signals", signals.signal_and_continue, TRANSFORMERS, 14, sample=2),
    Campaign("signals", signals.signal_and_continue, VLLM, 4),
    Campaign("two runs in a folder", shared_folder.start_two, DIFFUSION, 8, sample=1),
    Campaign("two runs in a folder", shared_folder.start_two, TRANSFORMERS, 4),
    Campaign("mutated configurations", configurations.mutate_and_check, TRANSFORMERS, 200, sample=20),
    Campaign("mutated configurations", configurations.mutate_and_check, DIFFUSION, 200),
    Campaign("surroundings", surroundings.run_in_each, TRANSFORMERS, 22, sample=1),
    Campaign("steps of a long run", long_run.run_long, TRANSFORMERS, 500),
    Campaign("steps of a long run", long_run.run_long, DIFFUSION, 500),
]


_SPOILED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a metric": ("metrics.jsonl", lambda content: content.replace(b'"reward": -', b'"reward": -1', 1)),
    "a line": ("metrics.jsonl", lambda content: content + content.splitlines()[-2] + b"\n"),
    "a weight": ("adapter_model.safetensors", lambda content: content[:-4] + b"\0\0\x80\x3f"),
    "a completion": ("completions/completions_00003.parquet", lambda content: b""),
    "a file": (".saving/left", lambda content: b""),
}


def _check(tally: Tally) -> None:
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.tried > 0
    assert not tally.lost, "\n\n".join(tally.lost)


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("campaign", [campaign.parameter for campaign in CAMPAIGNS])
def test_nothing_is_lost(campaign: Campaign, lab: Lab, tally: Tally) -> None:
    campaign.try_all(lab, tally, campaign.program, lab.number(campaign.count))
    _check(tally)


@pytest.mark.slow
@pytest.mark.parametrize("campaign", [campaign.parameter for campaign in CAMPAIGNS if campaign.sample])
def test_nothing_of_a_sample_is_lost(campaign: Campaign, lab: Lab, tally: Tally) -> None:
    campaign.try_all(lab, tally, campaign.program, campaign.sample)
    _check(tally)


@pytest.mark.slow
@pytest.mark.parametrize("what", _SPOILED)
def test_a_run_that_differs_is_seen(what: str, lab: Lab, tmp_path: Path) -> None:
    reference, run = lab.reference(TRANSFORMERS).folder, tmp_path / "run"
    shutil.copytree(reference, run)
    assert differences(run, reference) == []
    name, spoil = _SPOILED[what]
    source = reference / name
    content = spoil(source.read_bytes() if source.exists() else b"")
    if what == "a completion":  # those of another step
        content = (reference / "completions/completions_00002.parquet").read_bytes()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    (problem,) = differences(run, reference)
    assert name in problem
