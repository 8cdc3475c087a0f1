"""The planner's formula against the simulator, in allocated bytes of a training step and of a scoring forward.

The simulated figures of a whole model are extrapolated from two and three layers; `test_peak_is_linear_in_layers` shows
that this is exact.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from planner.activations import forward_bytes, train_activation_bytes
from planner.components import num_lora_params, optimizer_bytes_per_param, weight_bytes
from planner.host_memory import host_components, pinned_bytes
from planner.shapes import load_shape
from planner.teacher import TeacherSettings
from tests.helpers import memory_simulator
from tests.helpers.memory_simulator import Simulated, layer_count, simulate_scoring, simulate_training_step

QWEN = {size: f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")}


def point(model: str, rows: int, prompt: int, completion: int, precision: str, **changes: Any) -> TeacherSettings:
    return TeacherSettings(
        teacher=load_shape(QWEN.get(model, model)),
        student=None,
        reference="none",
        micro_batch=rows,
        max_prompt_len=prompt,
        max_completion_len=completion,
        train_batch=64,
        num_generations=16,
        aggregation_steps=4,
        **({"precision": precision, "attention": "flash"} | changes),  # type: ignore[arg-type]
    )


FAST_GRID = [
    point("7B", 2, 6144, 6144, "int8", attention="masked_sdpa"),
    point("7B", 3, 6144, 6144, "int8", int8_matmul="llm_int8", int8_inputs_released=False),
    point("7B", 1, 6144, 6144, "int8", int8_matmul="llm_int8"),
    point("32B", 1, 2048, 2048, "nf4"),
    point("0.5B", 8, 512, 512, "bf16"),
    point("Qwen/Qwen3-8B", 1, 4096, 8192, "int8"),
]
GRID = [
    *FAST_GRID,
    # int8 across models, contexts and micro-batches
    point("7B", 1, 512, 512, "int8"),
    point("7B", 1, 2048, 2048, "int8"),
    point("7B", 1, 12288, 12288, "int8"),
    point("7B", 4, 8192, 8192, "int8", attention="masked_sdpa"),
    point("7B", 8, 2048, 2048, "int8"),
    point("0.5B", 1, 512, 512, "int8"),
    point("0.5B", 8, 6144, 6144, "int8"),
    point("1.5B", 2, 4096, 4096, "int8", attention="masked_sdpa"),
    point("3B", 4, 2048, 4096, "int8"),
    point("14B", 2, 4096, 4096, "int8"),
    point("14B", 1, 12288, 12288, "int8", attention="masked_sdpa"),
    point("32B", 1, 6144, 6144, "int8"),
    point("32B", 4, 1024, 2048, "int8"),
    point("meta-llama/Llama-3.1-8B-Instruct", 2, 4096, 4096, "int8", attention="masked_sdpa"),
    point("Qwen/Qwen3-0.6B", 4, 1024, 1024, "int8"),
    # int8 variants
    point("7B", 1, 6144, 6144, "int8", int8_matmul="llm_int8", int8_threshold=0.0),
    point("7B", 1, 2048, 2048, "int8", int8_matmul="llm_int8", int8_inputs_released=False),
    point("14B", 1, 6144, 6144, "int8", int8_matmul="llm_int8", int8_inputs_released=False),
    point("7B", 8, 2048, 2048, "int8", int8_matmul="llm_int8"),
    point("0.5B", 1, 512, 512, "int8", int8_matmul="llm_int8"),
    point("32B", 4, 1024, 2048, "int8", int8_matmul="llm_int8"),
    point("Qwen/Qwen3-0.6B", 4, 1024, 1024, "int8", int8_matmul="llm_int8"),
    point("7B", 1, 2048, 2048, "int8", int8_matmul="llm_int8", checkpointing="none"),
    point("7B", 2, 6144, 6144, "int8", int8_matmul="llm_int8", checkpointing="layers_offloaded"),
    point("7B", 1, 2048, 2048, "int8", int8_matmul="llm_int8", attention="eager"),
    point("7B", 1, 2048, 2048, "int8", checkpointing="none"),
    point("7B", 2, 6144, 6144, "int8", checkpointing="layers_offloaded"),
    point("7B", 1, 2048, 2048, "int8", full_logits=True),
    point("7B", 1, 2048, 2048, "int8", attention="eager"),
    point("7B", 2, 6144, 6144, "int8", lora_r=128),
    point("7B", 2, 6144, 6144, "int8", lora_r=8, lora_targets=("q_proj", "v_proj")),
    point("7B", 2, 6144, 6144, "int8", adapter_bytes_per_param=2),
    # NF4
    point("0.5B", 1, 1024, 1024, "nf4"),
    point("3B", 1, 512, 512, "nf4"),
    point("3B", 2, 4096, 4096, "nf4", attention="masked_sdpa"),
    point("7B", 1, 512, 1536, "nf4"),
    point("7B", 4, 6144, 6144, "nf4"),
    point("14B", 1, 12288, 12288, "nf4"),
    point("32B", 2, 512, 512, "nf4", double_quant=False),
    point("Qwen/Qwen3-4B", 2, 2048, 2048, "nf4"),
    point("1.5B", 2, 2048, 2048, "nf4", checkpointing="none"),
    # bf16
    point("0.5B", 2, 6144, 6144, "bf16"),
    point("1.5B", 1, 2048, 2048, "bf16", adapter_bytes_per_param=2),
    point("7B", 1, 6144, 6144, "bf16"),
    point("7B", 3, 6144, 6144, "bf16", attention="masked_sdpa"),
    point("32B", 1, 2048, 2048, "bf16"),
    point("3B", 1, 2048, 2048, "bf16", checkpointing="none"),
    point("meta-llama/Llama-3.2-3B-Instruct", 2, 4096, 4096, "bf16"),
]


def name_of(s: TeacherSettings) -> str:
    default = point("7B", 1, 1, 1, "int8")
    known = {"teacher", "micro_batch", "max_prompt_len", "max_completion_len", "precision"}
    changed = [
        f"{key}={getattr(s, key)}" for key in vars(s) if key not in known and getattr(s, key) != getattr(default, key)
    ]
    size = s.teacher.name.split("/")[-1].removesuffix("-Instruct")
    return " ".join([size, s.precision, f"{s.micro_batch}x({s.max_prompt_len}+{s.max_completion_len})", *changed])


def whole_model(simulate: Any, settings: TeacherSettings) -> Simulated:
    two, three = (simulate(layer_count(settings, n)) for n in (2, 3))
    more = settings.teacher.num_layers - 2
    return Simulated(
        two.static_bytes + more * (three.static_bytes - two.static_bytes),
        two.peak_bytes + more * (three.peak_bytes - two.peak_bytes),
    )


def predicted_static(s: TeacherSettings) -> float:
    states = 2 * s.adapter_bytes_per_param + optimizer_bytes_per_param("adamw_8bit")
    adapter = num_lora_params(s.teacher, s.lora_r, s.lora_targets) * states
    return weight_bytes(s.teacher, s.precision, double_quant=s.double_quant) + adapter


def assert_formula_holds(settings: TeacherSettings) -> None:
    simulated = whole_model(simulate_training_step, settings)
    assert predicted_static(settings) == pytest.approx(simulated.static_bytes, rel=0.01)
    predicted = predicted_static(settings) + train_activation_bytes(settings)
    assert predicted == pytest.approx(simulated.peak_bytes, rel=0.02)


def test_grid_has_enough_points() -> None:
    assert len(GRID) >= 30
    assert len({name_of(settings) for settings in GRID}) == len(GRID)


@pytest.mark.parametrize("settings", FAST_GRID, ids=name_of)
def test_formula_is_within_two_percent_of_the_simulator(settings: TeacherSettings) -> None:
    assert_formula_holds(settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", GRID[len(FAST_GRID) :], ids=name_of)
def test_formula_is_within_two_percent_on_the_whole_grid(settings: TeacherSettings) -> None:
    assert_formula_holds(settings)


@pytest.mark.parametrize(
    "settings",
    [point("0.5B", 2, 2048, 2048, "int8"), point("0.5B", 2, 512, 512, "nf4", checkpointing="none")],
    ids=name_of,
)
def test_peak_is_linear_in_layers(settings: TeacherSettings) -> None:
    extrapolated, traced = whole_model(simulate_training_step, settings), simulate_training_step(settings)
    assert extrapolated.static_bytes == traced.static_bytes
    assert extrapolated.peak_bytes == pytest.approx(traced.peak_bytes, rel=1e-3)


@pytest.mark.slow
def test_peak_is_linear_in_layers_of_a_7b_with_the_int8_leak() -> None:
    settings = point("7B", 3, 6144, 6144, "int8", int8_matmul="llm_int8", int8_inputs_released=False)
    assert whole_model(simulate_training_step, settings).peak_bytes == pytest.approx(
        simulate_training_step(settings).peak_bytes, rel=1e-3
    )


SCORE_GRID = [
    (point("7B", 2, 6144, 6144, "int8", attention="masked_sdpa"), False),
    (point("7B", 1, 8192, 8192, "int8", attention="masked_sdpa"), True),
    (point("7B", 2, 6144, 6144, "int8", int8_matmul="llm_int8", attention="masked_sdpa"), False),
    (point("7B", 1, 8192, 8192, "int8", int8_matmul="llm_int8"), True),
    (point("7B", 4, 2048, 2048, "nf4"), False),
    (point("3B", 1, 512, 512, "nf4"), False),
    (point("14B", 2, 4096, 4096, "bf16"), True),
    (point("0.5B", 8, 1024, 1024, "int8", attention="eager"), False),
    (point("7B", 2, 4096, 4096, "fp8"), False),
    (point("3B", 4, 1024, 1024, "fp8"), False),
]


@pytest.mark.parametrize(
    ("settings", "adapter"), SCORE_GRID, ids=lambda v: name_of(v) if not isinstance(v, bool) else str(v)
)
def test_scoring_formula_is_within_two_percent_of_the_simulator(settings: TeacherSettings, adapter: bool) -> None:
    """A forward holds nothing per layer, so two layers show the peak over the weights."""
    simulated = simulate_scoring(layer_count(settings, 2), adapter=adapter)
    dynamic = simulated.peak_bytes - simulated.static_bytes
    weights = weight_bytes(settings.teacher, settings.precision, double_quant=settings.double_quant)
    predicted = forward_bytes(settings, settings.teacher, settings.micro_batch_tokens, adapter=adapter)
    assert weights + predicted == pytest.approx(weights + dynamic, rel=0.02)


def test_what_is_offloaded_is_what_autograd_saves_outside_the_checkpointed_blocks() -> None:
    """The planner's pinned blocks against those of every large tensor that a traced step hands to its hooks."""
    settings = layer_count(point("7B", 1, 1024, 1024, "int8", checkpointing="layers_offloaded"), 4)
    blocks = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.nbytes >= 1 << 20 and not isinstance(tensor, torch.nn.Parameter):
            blocks[tensor.untyped_storage()._cdata] = pinned_bytes(tensor.nbytes)
        return tensor

    with mock.patch.object(memory_simulator, "_drop_large", pack):
        simulate_training_step(settings)
    assert 2 * sum(blocks.values()) == pytest.approx(host_components(settings)["offloaded layer inputs"], rel=0.05)


def test_the_int8_leak_costs_more_than_the_card() -> None:
    fixed = point("7B", 3, 6144, 6144, "int8", int8_matmul="llm_int8")
    leaking = replace(fixed, int8_inputs_released=False)
    assert train_activation_bytes(leaking) - train_activation_bytes(fixed) == pytest.approx(61e9, rel=0.02)
