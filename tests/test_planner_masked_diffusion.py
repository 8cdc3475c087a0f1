"""The plan of masked-diffusion runs against the simulator, in allocated bytes of a training step."""

import subprocess
import sys
from dataclasses import replace

import pytest

from core.types import Phase
from optimization.training_optim import get_optimal_batch_size_for_gpu
from planner.components import num_lora_params, weight_bytes
from planner.masked_diffusion import (
    MaskedDiffusionSettings,
    masked_diffusion_settings,
    optimizer_state_bytes,
    train_all_activation_bytes,
)
from planner.plan import plan_run
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config
from tests.helpers.diffusion_simulator import simulate_diffusion_step

SHORT = ("max_response_length=512", "block_length=512", "sampling_steps=512", "per_device_train_batch_size=1")
STEPS = {
    "nano": ("llada_tiny",),
    "nano, one row": ("llada_tiny", "per_device_train_batch_size=1"),
    "nano, bf16": ("llada_tiny", "bf16=true"),
    "nano, AdamW": ("llada_tiny", "use_muon=false"),
    "nano, filled rows": ("llada_tiny", "packing=false"),
    "small": ("llada_pretrain",),
    "small, every activation kept": ("llada_pretrain", "gradient_checkpointing=false"),
    "small, not packed": ("llada_pretrain", "packing=false"),
    "small, short rows": ("llada_pretrain", *SHORT),
    "medium": ("llada_pretrain", "model_cfg=llada_medium"),
    "medium, one row": ("llada_pretrain", "model_cfg=llada_medium", "per_device_train_batch_size=1"),
}


def settings_of(run: str, *words: str) -> MaskedDiffusionSettings:
    return masked_diffusion_settings(load_run_config(compose_run_config(run, words)))


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS)
def test_a_training_step_is_within_three_percent_of_the_simulator(run):
    settings = settings_of(*run)
    simulated = simulate_diffusion_step(settings)
    num_params = settings.teacher.num_params
    states = num_params * (4 + 4) + optimizer_state_bytes(settings, num_params)
    assert states == pytest.approx(simulated.static_bytes, rel=0.01)
    assert states + train_all_activation_bytes(settings) == pytest.approx(simulated.peak_bytes, rel=0.03)


def test_only_masked_positions_are_charged_with_the_vocabulary():
    settings = settings_of("llada_pretrain")
    half = replace(settings, max_prompt_len=1024, max_completion_len=1024)
    saved = train_all_activation_bytes(settings) - train_all_activation_bytes(half)
    assert saved == pytest.approx(12 * settings.teacher.vocab * 4 * 1024, rel=0.02)


def test_the_phases_hold_what_a_run_has_and_no_key_value_cache():
    plan = plan_run(load_run_config(compose_run_config("llada_sft")), int(85e9))
    settings = plan.settings
    train = plan.components[Phase.TRAIN]
    num_params = num_lora_params(settings.teacher, settings.lora_r)
    assert train["teacher"] == round(weight_bytes(settings.teacher, "int8"))
    assert train["adapter"] == train["gradients"] == 4 * num_params
    assert plan.kv_cache_bytes == 0 and plan.peak_bytes(Phase.SYNC) == 0
    assert plan.binding_phase == Phase.TRAIN and plan.fits()


def test_parameters_of_the_paper():
    """LLaDA 1B: 1.49 billion parameters; 8B: 8.02."""
    medium = settings_of("llada_pretrain", "model_cfg=llada_medium").teacher
    large = settings_of("llada_sft").teacher
    assert round(medium.num_params / 1e9, 2) == 1.49
    assert round(large.num_params / 1e9, 2) == 8.02


@pytest.mark.parametrize("size", ["nano", "small", "medium", "large"])
def test_the_batch_of_each_size_is_chosen_by_the_plan(size):
    choice = get_optimal_batch_size_for_gpu("llada", size, gpu_gb=85)
    assert choice.batch_size >= 1 and choice.peak_bytes <= 0.97 * 85e9
    assert get_optimal_batch_size_for_gpu("llada", size, gpu_gb=160).batch_size >= choice.batch_size


def test_optimize_shows_the_plan_of_a_size_on_any_machine():
    words = ["--all", "--train", "--model", "llada", "--size", "medium", "max_steps=1", "--dry-run"]
    command = [sys.executable, "-m", "optimization.cli", *words]
    done = subprocess.run(command, cwd=CONFIG_ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new model of 22 x 2048, 256 rows per step" in done.stdout and "predicted peak" in done.stdout
    # The reasons stand in a table, where lines are broken.
    assert "a masked-diffusion run has no student and no" in done.stdout and "this run has neither" in done.stdout
    assert "./launch_mono.sh llada_pretrain model_cfg=llada_medium" in done.stdout
