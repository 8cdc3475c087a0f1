"""The plan of supervised fine-tuning against the simulator, in allocated bytes of a training step.

Whole models are extrapolated from two and three layers, as in tests/test_planner_formula.py.
"""

from dataclasses import replace
from typing import Any

import pytest
from trl.kernels import chunked_logprob

import trainers.sft
from core.types import Phase
from planner.components import num_lora_params, weight_bytes
from planner.constants import HEAD_TILE_COLUMNS, HEAD_TILE_TOKENS
from planner.plan import plan_run
from planner.sft import SupervisedSettings, supervised_components
from planner.shapes import load_shape
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.sft_simulator import simulate_supervised_step
from tests.test_planner_formula import QWEN, whole_model


def point(model: str, rows: int, length: int, precision: str, **changes: Any) -> SupervisedSettings:
    return SupervisedSettings(
        teacher=load_shape(QWEN.get(model, model)),
        micro_batch=rows,
        max_prompt_len=0,
        max_completion_len=length,
        train_batch=16,
        precision=precision,  # type: ignore[arg-type]
        tiled_head=True,
        **({"trains_all": False, "autocast": True, "attention": "flash"} | changes),
    )


GRID = {
    "int8, as configured": point("7B", 1, 16384, "int8"),
    "bf16, as configured": point("7B", 1, 16384, "bf16"),
    "int8, short": point("7B", 1, 1024, "int8"),
    "int8, all kept": point("7B", 1, 4096, "int8", checkpointing="none"),
    "nf4": point("0.5B", 4, 2048, "nf4"),
    "nf4, 32B": point("32B", 1, 8192, "nf4"),
    "bf16, short": point("0.5B", 1, 512, "bf16"),
    "int8, Qwen3": point("Qwen/Qwen3-8B", 1, 8192, "int8"),
    "int8, offloaded": point("7B", 1, 16384, "int8", checkpointing="layers_offloaded"),
    "all, float32": point("0.5B", 4, 2048, "fp32", trains_all=True),
    "all, float32, kept": point("0.5B", 4, 2048, "fp32", trains_all=True, checkpointing="none"),
    "all, float32, 7B": point("7B", 1, 16384, "fp32", trains_all=True),
    "all, float32, no autocast": point("0.5B", 4, 1024, "fp32", trains_all=True, autocast=False),
    "all, bf16": point("0.5B", 4, 2048, "bf16", trains_all=True),
    "all, bf16, kept": point("0.5B", 2, 1024, "bf16", trains_all=True, checkpointing="none"),
    "all, bf16, 7B": point("7B", 1, 4096, "bf16", trains_all=True),
    "all, bf16, 7B, long": point("7B", 1, 16384, "bf16", trains_all=True),
}
ALWAYS = {"int8, as configured", "bf16, as configured", "all, float32", "all, bf16"}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, id=name, marks=() if name in ALWAYS else pytest.mark.slow) for name, s in GRID.items()],
)
def test_a_training_step_is_within_three_percent_of_the_simulator(settings):
    simulated = whole_model(simulate_supervised_step, settings)
    train = supervised_components(settings)[Phase.TRAIN]
    states = sum(train[name] for name in ("teacher", "gradients", "optimizer states")) + train.get("adapter", 0.0)
    assert states == pytest.approx(simulated.static_bytes, rel=0.01)
    assert states + train["activations"] == pytest.approx(simulated.peak_bytes, rel=0.03)


def test_the_embedded_student_is_planned_within_three_percent():
    settings = plan_run(load_run_config(compose_run_config("student_sft_tiny")), int(8e9)).settings
    assert settings.trains_all and not settings.autocast and settings.optimizer == "muon"
    simulated = simulate_supervised_step(settings)
    train = supervised_components(settings)[Phase.TRAIN]
    states = sum(train[name] for name in ("teacher", "gradients", "optimizer states"))
    assert states + train["activations"] == pytest.approx(simulated.peak_bytes, rel=0.03)


def test_the_phases_hold_what_a_run_has():
    plan = plan_run(load_run_config(compose_run_config("teacher_sft_85gb")), int(85e9))
    settings, train = plan.settings, plan.components[Phase.TRAIN]
    num_params = num_lora_params(settings.teacher, settings.lora_r)
    assert train["teacher"] == round(weight_bytes(settings.teacher, "int8"))
    assert train["adapter"] == train["gradients"] == 4 * num_params
    assert plan.kv_cache_bytes == plan.peak_bytes(Phase.GENERATE) == plan.peak_bytes(Phase.SYNC) == 0
    assert plan.binding_phase == Phase.TRAIN and plan.fits()


def test_all_weights_are_planned_with_their_gradients_and_states():
    words = ["trainable_weights=all", "max_length=4096"]
    adapter, whole = (
        plan_run(load_run_config(compose_run_config("student_sft_85gb", more)), int(150e9)) for more in ([], words)
    )
    num_params = whole.settings.teacher.num_params
    assert whole.components[Phase.TRAIN]["gradients"] == 2 * num_params
    assert whole.max_bytes > adapter.max_bytes + 2 * num_params
    longer = replace(whole.settings, max_completion_len=8192)
    assert longer.plan(None).max_bytes > whole.max_bytes


def test_the_tiles_are_those_of_the_library():
    assert HEAD_TILE_TOKENS.value == chunked_logprob.TOKEN_CHUNK_SIZE
    assert HEAD_TILE_COLUMNS.value == trainers.sft._TILE_COLUMNS
