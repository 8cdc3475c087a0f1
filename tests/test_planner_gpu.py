"""The formula against a real GPU: a smaller grid, `max_memory_allocated` and `max_memory_reserved` of a training step.

Prints one line per point and the figures for planner/constants.py (GPU and date included).
"""

import datetime
import gc

import pytest
import torch

from core.units import gb
from planner.activations import train_activation_bytes
from planner.host_memory import pinned_bytes
from planner.teacher import TeacherSettings
from tests.helpers.measured_step import Measured, measure_training_step, run_step
from tests.helpers.step_models import build_model
from tests.test_planner_formula import name_of, point, predicted_static

GPU_GRID = [
    point("0.5B", 2, 1024, 1024, "int8"),
    point("0.5B", 8, 512, 512, "int8"),
    point("0.5B", 8, 512, 512, "int8", int8_matmul="llm_int8"),
    point("0.5B", 1, 1024, 1024, "int8", int8_matmul="llm_int8", int8_inputs_released=False),
    point("1.5B", 1, 2048, 2048, "int8", attention="masked_sdpa"),
    point("1.5B", 1, 1024, 1024, "nf4"),
    point("0.5B", 2, 1024, 1024, "bf16"),
    point("3B", 1, 2048, 2048, "int8"),
]


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16"])
def test_the_measured_step_runs_and_trains_every_adapter_matrix(precision: str) -> None:
    """On the CPU, without measuring: what a GPU machine will run."""
    settings = point("tiny", 2, 16, 16, precision, attention="masked_sdpa")
    model = build_model(settings, "cpu")
    run_step(model, settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * settings.teacher.num_layers
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", GPU_GRID, ids=name_of)
def test_allocated_memory_of_a_real_step_is_within_five_percent(settings: TeacherSettings) -> None:
    """Random weights of the real shape. cuBLAS and Triton workspaces come on top of the formula: up to 0.3 GB."""
    measured: Measured = measure_training_step(settings)
    predicted = predicted_static(settings) + train_activation_bytes(settings)
    dynamic = measured.allocated_bytes - measured.static_bytes
    figures = [
        f"predicted {gb(predicted):.2f} GB",
        f"allocated {gb(measured.allocated_bytes):.2f}",
        f"reserved {gb(measured.reserved_bytes):.2f}",
        f"reserved over allocated, dynamic part: {(measured.reserved_bytes - measured.static_bytes) / dynamic:.3f}",
        f"outside torch {gb(measured.outside_torch_bytes):.2f}",
    ]
    print(f"{torch.cuda.get_device_name()} {datetime.date.today()} {name_of(settings)}: {', '.join(figures)}")
    gc.collect()
    torch.cuda.empty_cache()
    assert measured.allocated_bytes == pytest.approx(predicted, rel=0.05, abs=0.3e9)


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [(1 << 20) + 1, 20 << 20, 130 << 20])
def test_torch_pins_the_block_that_is_planned(num_bytes: int) -> None:
    before = torch.cuda.host_memory_stats()["active_bytes.current"]
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    assert torch.cuda.host_memory_stats()["active_bytes.current"] - before == pinned_bytes(pinned.nbytes)
