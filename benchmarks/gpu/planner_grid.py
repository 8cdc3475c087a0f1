"""Part c: the planner's grid of training steps, measured, and the constants that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.cell import Setup, SkipCell, require_cuda
from benchmarks.gpu.parts import WHOLE_RUN, cells_of
from benchmarks.gpu.random_model import TINY
from benchmarks.gpu.runner import Figures, read_result
from core.units import gb
from planner.activations import train_activation_bytes
from planner.constants import CUDA_CONTEXT_BYTES, CUDA_GRAPH_BYTES, FRAGMENTATION_FRAC, VLLM_ASLEEP_BYTES
from tests.helpers.measured_step import measure_training_step, run_step
from tests.helpers.step_models import build_model
from tests.test_planner_formula import name_of, predicted_static
from tests.test_planner_gpu import GPU_GRID


def measure_point(setup: Setup, figures: Figures) -> None:
    """One point of the grid, in a process of its own, so that what lies outside of torch is one context's."""
    settings = GPU_GRID[setup.arguments["index"]]
    if setup.is_tiny:
        settings = replace(settings, teacher=TINY, micro_batch=2, max_prompt_len=16, max_completion_len=16)
        run_step(build_model(settings, "cpu"), settings)
    require_cuda()
    measured = measure_training_step(settings)
    static, activations = predicted_static(settings), train_activation_bytes(settings)
    figures.update(
        point={
            "name": name_of(settings),
            "predicted_gb": gb(static + activations),
            "static_gb": gb(measured.static_bytes),
            "predicted_static_gb": gb(static),
            "allocated_gb": gb(measured.allocated_bytes),
            "reserved_gb": gb(measured.reserved_bytes),
            "outside_torch_gb": gb(measured.outside_torch_bytes),
        }
    )
    difference = 100 * (measured.allocated_bytes / (static + activations) - 1)
    figures.add_table(
        "training step, GB",
        ("point", "predicted", "allocated", "difference", "reserved", "outside torch"),
        [
            [
                name_of(settings),
                f"{gb(static + activations):.2f}",
                f"{gb(measured.allocated_bytes):.2f}",
                f"{difference:+.1f} %",
                f"{gb(measured.reserved_bytes):.2f}",
                f"{gb(measured.outside_torch_bytes):.2f}",
            ]
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A constant of planner/constants.py as the measured grid has it."""

    constant: str
    current: float
    least_squares: float
    covering: float
    """The smallest value with which no point exceeds its prediction: the one to plan with."""
    num_points: int


def propose(points: Sequence[dict[str, Any]]) -> list[Proposal]:
    """Constants from measured points (GB, as `measure_point` writes them).

    The allocator's overhead is the slope through the origin of reserved over allocated bytes of what comes and goes;
    the context a mean and a maximum. `workspace` is what allocated memory exceeds the formula by: cuBLAS, Triton.
    """
    dynamic = [p["allocated_gb"] - p["static_gb"] for p in points]
    overhead = [p["reserved_gb"] - p["allocated_gb"] for p in points]
    slope = sum(o * d for o, d in zip(overhead, dynamic, strict=True)) / sum(d * d for d in dynamic)
    steepest = max(o / d for o, d in zip(overhead, dynamic, strict=True))
    outside = [1e9 * p["outside_torch_gb"] for p in points]
    excess = [1e9 * (p["allocated_gb"] - p["predicted_gb"]) for p in points]
    found = (
        ("FRAGMENTATION_FRAC", FRAGMENTATION_FRAC.value, slope, steepest),
        ("CUDA_CONTEXT_BYTES", CUDA_CONTEXT_BYTES.value, sum(outside) / len(outside), max(outside)),
        ("workspace beyond the formula, bytes (no constant yet)", 0.0, sum(excess) / len(excess), max(excess)),
    )
    return [
        Proposal(constant=name, current=now, least_squares=fitted, covering=covering, num_points=len(points))
        for name, now, fitted, covering in found
    ]


def propose_constants(setup: Setup, figures: Figures) -> None:
    """The proposals from every point that has a result in OUT."""
    results = [read_result(setup.out, cell) for cell in cells_of("c", setup.shape)]
    points = [r.figures["point"] for r in results if r is not None and r.status == "ok" and "point" in r.figures]
    if len(points) < 2:
        raise SkipCell(f"{len(points)} points of the grid are measured; two at least are needed")
    proposals = [*propose(points), *_vllm_residue(setup)]
    figures.update(proposals=[vars(proposal) for proposal in proposals])
    figures.add_table(
        "constants for planner/constants.py, proposed from the grid",
        ("constant", "now", "least squares", "covers every point", "points"),
        [
            [p.constant, f"{p.current:.4g}", f"{p.least_squares:.4g}", f"{p.covering:.4g}", str(p.num_points)]
            for p in proposals
        ],
    )


def _vllm_residue(setup: Setup) -> list[Proposal]:
    """What a sleeping vLLM keeps, from part a where it has a result."""
    whole_run = read_result(setup.out, WHOLE_RUN)
    if whole_run is None or whole_run.status != "ok":
        return []
    measured = 1e9 * whole_run.figures["components"]["measured_gb"]["vLLM residue"]
    current = VLLM_ASLEEP_BYTES.value + CUDA_GRAPH_BYTES.value
    name = "VLLM_ASLEEP_BYTES + CUDA_GRAPH_BYTES"
    return [Proposal(constant=name, current=current, least_squares=measured, covering=measured, num_points=1)]
