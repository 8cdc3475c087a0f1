"""Parts of the GPU measurements: the cells of each, and where to look where one fails."""

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.runner import Cell

_NUM_GRID_POINTS = 8
"""Of tests/test_planner_gpu.py; a test holds the two together without importing torch here."""
# Configurations for small GPUs, each with the shape of its teacher.
_SMALL_CARDS = {
    "teacher_rlt_mono_8gb": "3B",
    "teacher_rlt_mono_12gb": "7B",
    "teacher_rlt_mono_24gb": "14B",
    "teacher_rlt_mono_24gb_int8": "7B",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: its letter, the question that it answers, and what to look at where it fails."""

    letter: str
    question: str
    if_it_fails: str


PARTS = {
    part.letter: part
    for part in (
        Part(
            letter="a",
            question="the 85 GB configuration, two steps: peak per phase and component beside the plan",
            if_it_fails="the last phase in the log. Engine start: again with vllm_enforce_eager=true. Memory: the "
            "components table. CanaryError: generation/vllm_engine.py and models/export.py",
        ),
        Part(
            letter="b",
            question="the tests that need a GPU",
            if_it_fails="FAILED lines in the log; each test runs alone: pytest -n 0 -m '' NODE_ID",
        ),
        Part(
            letter="c",
            question="the planner's grid of training steps, and constants proposed from it",
            if_it_fails="the point that is named: the formula (planner/activations.py) or its workspace is off",
        ),
        Part(
            letter="d",
            question="seconds and tokens/s of each phase beside the floor from measured rates",
            if_it_fails="whether part a has a result: its seconds are used",
        ),
        Part(
            letter="e",
            question="configurations for small GPUs, on a GPU made as small",
            if_it_fails="out of memory: the components table, then the configuration's levers "
            "(python test_config_85gb.py --config-name NAME)",
        ),
        Part(
            letter="f",
            question="what fp8, compilation and the attention kernels give",
            if_it_fails="which of them is named last in the log; the others have their rows",
        ),
        Part(
            letter="g",
            question="50 steps of the embedded run: does it learn on this GPU",
            if_it_fails="results of the run below OUT/scratch/embedded: metrics.jsonl, completions/",
        ),
    )
}

WHOLE_RUN = Cell(
    part="a",
    name="whole_run",
    function="benchmarks.gpu.training:whole_configuration",
    expected_s=480,
    arguments={"config": "teacher_rlt_mono_85gb"},
)


def cells_of(letter: str, shape: str) -> list[Cell]:
    """The cells of a part; with the tiny shape one of each kind."""
    cells = _CELLS[letter]
    if shape != "tiny":
        return cells
    kinds: dict[object, Cell] = {}
    for cell in cells:
        kinds.setdefault((cell.function, cell.arguments.get("expression")), cell)
    return list(kinds.values())


def _cell(part: str, name: str, function: str, expected_s: int, **arguments: Any) -> Cell:
    function = f"benchmarks.gpu.{function}"
    return Cell(part=part, name=name, function=function, expected_s=expected_s, arguments=arguments)


_CELLS: dict[str, list[Cell]] = {
    "a": [WHOLE_RUN],
    "b": [
        _cell("b", "tests", "gpu_tests:run_tests", 240, expression="gpu and not engine", needs_cuda=False),
        _cell("b", "engines", "gpu_tests:run_tests", 300, expression="engine", needs_cuda=True),
    ],
    "c": [
        *(_cell("c", f"point_{i}", "planner_grid:measure_point", 60, index=i) for i in range(_NUM_GRID_POINTS)),
        _cell("c", "constants", "planner_grid:propose_constants", 30),
    ],
    "d": [_cell("d", "floors", "speed:phases_beside_floors", 60)],
    "e": [
        _cell("e", config, "training:small_card", 240, config=config, shape=shape)
        for config, shape in _SMALL_CARDS.items()
    ],
    "f": [
        _cell("f", "attention", "kernels:attention_kernels", 60),
        _cell("f", "optimizations", "kernels:optimizations", 180),
    ],
    "g": [_cell("g", "embedded_run", "learning:embedded_run", 300)],
}
