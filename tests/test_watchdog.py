"""The growth watchdog on synthetic memory curves."""

import random

import pytest
from transformers import TrainerState

from core.log import log
from models.meter import PhaseUse
from planner.watchdog import MIN_STEPS, WARM_UP_STEPS, GrowthWatchdog, forecast
from trainers.callbacks import MemoryWatch

LIMIT = 80_000_000_000
MB = 1_000_000


def curve(num_steps: int, *, start: float, per_step: float, noise: float, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(step, round(start + per_step * step + noise * rng.gauss(0, 1))) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_found_through_noise_and_its_end_is_about_right(seed: int) -> None:
    peaks = curve(40, start=60e9, per_step=100 * MB, noise=150 * MB, seed=seed)
    found = forecast("allocated", peaks, LIMIT)
    assert found is not None
    assert found.bytes_per_step == pytest.approx(100 * MB, rel=0.15)
    assert found.out_of_memory_step == pytest.approx(200, rel=0.15)
    assert "out of memory at about step" in found.message


@pytest.mark.parametrize("seed", range(20))
def test_noise_without_growth_is_no_leak(seed: int) -> None:
    """Peaks vary by gigabytes with the lengths of the completions."""
    assert forecast("allocated", curve(60, start=60e9, per_step=0, noise=2e9, seed=seed), LIMIT) is None


def test_growth_of_the_first_steps_is_expected() -> None:
    warm_up = [(step, round(40e9 + 5e9 * step)) for step in range(1, WARM_UP_STEPS + 1)]
    steady = [(step, round(55e9)) for step in range(WARM_UP_STEPS + 1, 40)]
    assert forecast("reserved", warm_up + steady, LIMIT) is None


def test_a_single_jump_is_no_trend() -> None:
    """A longer row than any before raises the reserved memory once."""
    peaks = [(step, round(50e9 if step < 20 else 58e9)) for step in range(1, 45)]
    assert forecast("reserved", peaks, LIMIT) is None


def test_shrinking_memory_and_short_histories_give_no_forecast() -> None:
    assert forecast("allocated", curve(40, start=60e9, per_step=-50 * MB, noise=MB), LIMIT) is None
    assert forecast("allocated", curve(WARM_UP_STEPS + MIN_STEPS - 1, start=60e9, per_step=1e9, noise=0), LIMIT) is None


def run(watchdog: GrowthWatchdog, per_step: float, num_steps: int) -> list[int]:
    """Steps at which the watchdog spoke."""
    spoke = []
    for step, size in curve(num_steps, start=60e9, per_step=per_step, noise=20 * MB):
        if watchdog.observe(step, allocated_bytes=size, reserved_bytes=size + 2 * 10**9) is not None:
            spoke.append(step)
    return spoke


def test_warnings_are_few_and_far_between() -> None:
    spoke = run(GrowthWatchdog(limit_bytes=LIMIT, max_steps=300, max_warnings=3), 100 * MB, 150)
    assert 1 <= len(spoke) <= 3 and spoke[0] <= 20
    assert all(later >= 2 * earlier for earlier, later in zip(spoke, spoke[1:], strict=False))
    assert run(GrowthWatchdog(limit_bytes=LIMIT, max_steps=300, max_warnings=0), 100 * MB, 150) == []


def test_a_leak_that_outlives_the_run_is_not_worth_a_warning() -> None:
    assert run(GrowthWatchdog(limit_bytes=LIMIT, max_steps=150, max_warnings=3), 100 * MB, 60) == []


def test_the_nearer_limit_is_reported() -> None:
    watchdog = GrowthWatchdog(limit_bytes=LIMIT, max_steps=1000, max_warnings=1)
    found = None
    for step in range(1, 30):
        found = found or watchdog.observe(step, allocated_bytes=50 * 10**9, reserved_bytes=60 * 10**9 + step * 200 * MB)
    assert found is not None and found.kind == "reserved" and found.out_of_memory_step == pytest.approx(100, abs=2)


@pytest.mark.parametrize(("num_steps", "is_warned"), [(30, False), (300, True)])
def test_a_leak_is_worth_a_warning_where_the_run_itself_would_meet_its_end(num_steps, is_warned, caplog, monkeypatch):
    """With `max_steps` -1 the trainer's state alone knows how long the run is."""

    class LeakingMeter:
        peak = 60_000 * MB

        def take_recent_peak(self) -> PhaseUse:
            self.peak += 100 * MB
            return PhaseUse(peak_allocated_bytes=self.peak, peak_reserved_bytes=self.peak)

    monkeypatch.setattr(log, "propagate", True)
    watch = MemoryWatch(LeakingMeter(), limit_bytes=LIMIT, max_warnings=3)
    state = TrainerState(max_steps=num_steps)
    watch.on_train_begin(None, state, None)
    for state.global_step in range(1, 31):
        watch.on_step_end(None, state, None)
    assert ("out of memory at about step" in caplog.text) == is_warned
