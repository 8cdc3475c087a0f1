"""Peaks of the phases while vLLM sleeps and wakes on the same GPU, and its end: on a stand-in for the GPU."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import generation.vllm_engine as vllm_engine
import models.host as host_module
from core.log import log
from core.types import Phase, Role
from generation import SamplingSettings
from generation.vllm_engine import BaseForVLLM, VLLMEngineConfig, VLLMGenerator
from models.host import ModelHost
from models.shared_base import SharedBase
from planner.constants import VLLM_BATCHED_TOKENS
from schemas.compose import CONFIG_ROOT
from tests.helpers.fake_card import CONTEXT_BYTES, GB, FakeCard, FakeLLM, stub_module

ENGINE_BYTES = 27 * GB
ENGINE = VLLMEngineConfig(
    base=BaseForVLLM(checkpoint="base", weights="under test", shares_trainer_weights=True),
    dtype="bfloat16",
    on_gpu=True,
    max_model_len=128,
    rows_per_call=16,
    max_lora_rank=8,
    kv_cache_bytes=GB,
    gpu_memory_utilization=0.5,
)


@pytest.fixture
def card(monkeypatch):
    card = FakeCard()
    card.install(monkeypatch)
    return card


@pytest.fixture
def host(card, monkeypatch):
    """A host whose models take 18 GB of the GPU."""

    def load(*_):
        card.allocate(9 * GB)
        return nn.Linear(1, 1)

    monkeypatch.setattr(host_module, "load_base", load)
    monkeypatch.setattr(host_module, "load_frozen", load)
    monkeypatch.setattr(host_module, "add_adapter", lambda base, args: base)
    monkeypatch.setattr(host_module, "pick_device", lambda device_map: torch.device("cuda:0"))
    config = SimpleNamespace(
        model_args=SimpleNamespace(device_map="auto"),
        model_name_or_path="teacher",
        student_model="student",
        reference_model="shared",
    )
    return ModelHost(config, roles=(Role.TEACHER, Role.STUDENT), max_score_tokens=1)


def start_generator(card, monkeypatch, **start):
    engines = []

    def start_engine(config):
        engines.append(FakeLLM(card, ENGINE_BYTES, **start))
        return engines[-1]

    monkeypatch.setattr(vllm_engine, "_start_engine", start_engine)
    return VLLMGenerator(ENGINE, SamplingSettings(temperature=1.0, max_new_tokens=4, stop_token_ids=(1,))), engines[0]


@pytest.mark.parametrize("seed", range(10))
def test_each_phase_has_the_peak_that_was_really_on_the_card(seed, card, host, monkeypatch):
    """Phases with tensors of random sizes: what is measured is what was mapped at its highest, byte for byte."""
    with host.phase(Phase.LOAD):
        generator, _ = start_generator(card, monkeypatch, slack_bytes=GB, trimmed_bytes=3 * GB)
        host.attach_engine(generator)
    rng, true_peaks = random.Random(seed), {}

    def look(phase):
        true_peaks[phase] = max(true_peaks.get(phase, 0), card.now_bytes)

    def work(phase):
        held = []
        look(phase)
        for _ in range(rng.randint(1, 6)):
            if held and rng.random() < 0.4:
                card.free(held.pop())
            else:
                held.append(card.allocate(rng.choice((1, 2, 3)) * GB))
            look(phase)
        for address in held:
            card.free(address)

    with host.phase(Phase.TRAIN):
        for _ in range(4):
            with host.phase(Phase.GENERATE):
                with host.phase(Phase.SYNC):
                    work(Phase.SYNC)
                work(Phase.GENERATE)
            look(Phase.TRAIN)
            with host.phase(Phase.SCORE):
                work(Phase.SCORE)
            work(Phase.TRAIN)
    use = host.meter.checkpoint_use()
    assert {phase: use[phase].peak_reserved_bytes for phase in true_peaks} == true_peaks
    assert {phase: use[phase].peak_driver_bytes - CONTEXT_BYTES for phase in true_peaks} == true_peaks
    assert all(18 * GB <= use[phase].peak_allocated_bytes <= peak for phase, peak in true_peaks.items())


def test_a_sleeping_engine_is_in_no_peak_of_scoring_and_training(card, host, monkeypatch):
    with host.phase(Phase.LOAD):
        generator, _ = start_generator(card, monkeypatch, slack_bytes=GB, trimmed_bytes=3 * GB)
        host.attach_engine(generator)
    host.meter.take_recent_peak()
    with host.phase(Phase.TRAIN):
        with host.phase(Phase.SCORE):
            card.free(card.allocate(8 * GB))
        card.free(card.allocate(20 * GB))
        step = host.meter.take_recent_peak()
        with host.phase(Phase.GENERATE):
            card.free(card.allocate(GB))
    use = host.meter.checkpoint_use()
    measured = {phase: (u.peak_allocated_bytes, u.peak_reserved_bytes, u.peak_driver_bytes) for phase, u in use.items()}
    bases = 18 * GB
    engine = ENGINE_BYTES + GB
    assert measured[Phase.SCORE] == (bases + 8 * GB, bases + 8 * GB, bases + 8 * GB + CONTEXT_BYTES)
    # The 8 GB that scoring left in torch's cache are still reserved.
    assert measured[Phase.TRAIN] == (bases + 20 * GB, bases + 28 * GB, bases + 28 * GB + CONTEXT_BYTES)
    assert (step.peak_allocated_bytes, step.peak_reserved_bytes) == (bases + 20 * GB, bases + 28 * GB)
    # None of it is beside the engine, which wakes after the cache was emptied.
    assert measured[Phase.GENERATE] == (
        bases + ENGINE_BYTES + GB,
        bases + engine + GB,
        bases + engine + GB + CONTEXT_BYTES,
    )


def test_loading_contains_the_start_of_the_engine_and_its_memory_awake(card, host, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    before_s = host.meter.checkpoint_use()[Phase.LOAD].seconds
    with host.phase(Phase.LOAD):
        generator, _ = start_generator(card, monkeypatch)
        host.attach_engine(generator)
    load = host.meter.checkpoint_use()[Phase.LOAD]
    assert load.seconds > before_s
    assert load.peak_reserved_bytes == 18 * GB + ENGINE_BYTES
    assert load.peak_driver_bytes == 18 * GB + ENGINE_BYTES + CONTEXT_BYTES
    begun, done = dict.fromkeys(caplog.messages)
    assert begun.startswith("starting vLLM on the GPU") and done == f"{begun}: done in 0s"


def test_an_engine_that_sleeps_is_woken_on_an_emptied_cache_before_it_is_freed(card, monkeypatch):
    generator, llm = start_generator(card, monkeypatch)
    generator.sleep()
    card.free(card.allocate(70 * GB))  # in torch's cache: no room to wake in until it is emptied
    generator.close()
    assert llm.events == ["sleep", "wake", "shutdown"]
    assert not card.cumem and generator.unmapped_memory().reserved_bytes == 0
    assert not generator._adapter_folder.path.exists()


def test_an_engine_that_was_never_put_to_sleep_is_freed_as_it_is(card, monkeypatch):
    generator, llm = start_generator(card, monkeypatch)
    generator.close()
    assert llm.events == ["shutdown"]


def test_on_a_card_too_full_to_wake_in_the_engine_is_left_to_the_end_of_the_process(card, monkeypatch, caplog):
    """After an out-of-memory of the trainer its tensors are still there; closing must not hide that error."""
    generator, llm = start_generator(card, monkeypatch)
    generator.sleep()
    card.allocate(70 * GB)
    monkeypatch.setattr(log, "propagate", True)
    generator.close()
    assert llm.events == ["sleep"]
    assert "vLLM ends with this process" in caplog.text and "27.0 GB" in caplog.text
    assert not generator._adapter_folder.path.exists()


@pytest.mark.parametrize(
    ("methods", "calls"),
    [
        (["sleep", "release_kv_cache_memory", "wake_up"], [("sleep", 0), ("release_kv_cache_memory",), ("wake_up",)]),
        (["sleep", "wake_up"], [("sleep", 1), ("wake_up",)]),  # vLLM 0.26
    ],
)
def test_an_engine_on_the_trainers_base_gives_back_its_cache_and_nothing_else(card, monkeypatch, methods, calls):
    seen = []
    llm = SimpleNamespace(**{name: lambda *a, name=name, **k: seen.append((name, *a, *k.values())) for name in methods})
    monkeypatch.setattr(vllm_engine, "_start_engine", lambda config: llm)
    settings = SamplingSettings(temperature=1.0, max_new_tokens=4, stop_token_ids=(1,))
    generator = VLLMGenerator(replace(ENGINE, base=replace(ENGINE.base, shared_base=SharedBase())), settings)
    for _ in range(2):
        generator.sleep()
    generator.wake()
    assert seen == calls


def test_vllm_takes_as_many_tokens_at_once_as_the_plan_counts(card, monkeypatch):
    """Its own choice is 16,384 on GPUs of 70 GB and more."""
    stub_module(monkeypatch, "vllm", LLM=lambda **settings: settings)
    assert vllm_engine._start_engine(ENGINE)["max_num_batched_tokens"] == VLLM_BATCHED_TOKENS.value
    long_calls = replace(ENGINE, max_model_len=16_384)
    assert vllm_engine._start_engine(long_calls)["max_num_batched_tokens"] == VLLM_BATCHED_TOKENS.value


_SLEEP_AND_START_AGAIN = """
import json, sys
from pathlib import Path
import torch
from generation import SamplingSettings
from generation.vllm_engine import BaseForVLLM, VLLMEngineConfig, VLLMGenerator
from tests.helpers.planted_outliers import write_planted_model

def start():
    config = VLLMEngineConfig(
        base=BaseForVLLM(checkpoint=sys.argv[1], weights="under test", shares_trainer_weights=True),
        dtype="bfloat16", on_gpu=True, max_model_len=128, rows_per_call=16, max_lora_rank=8,
        kv_cache_bytes=512_000_000, gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    return VLLMGenerator(config, SamplingSettings(temperature=1.0, max_new_tokens=4, stop_token_ids=(1,)))

def used():
    free, total = torch.cuda.mem_get_info()
    return total - free

write_planted_model(Path(sys.argv[1]), outlier_scale=1.0)
engine, rows = start(), [list(range(5, 40))]
first, awake, before = engine.logprobs(rows), used(), engine.unmapped_memory()
engine.sleep()
asleep, counted = used(), engine.unmapped_memory()
engine.close()
engine = start()
second = engine.logprobs(rows)
engine.close()
print(json.dumps({
    "given_back": awake - asleep,
    "counted": counted.reserved_bytes - before.reserved_bytes,
    "allocated": counted.allocated_bytes,
    "difference": max(abs(a - b) for a, b in zip(first[0], second[0])),
}))
"""


@pytest.mark.gpu
def test_what_sleeps_is_what_the_driver_gets_back_and_a_second_engine_starts_after_it(tmp_path):
    command = [sys.executable, "-c", _SLEEP_AND_START_AGAIN, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=CONFIG_ROOT.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["given_back"] == pytest.approx(found["counted"], abs=50_000_000)
    assert 512_000_000 <= found["allocated"] <= found["counted"]
    assert found["difference"] < 1e-3
