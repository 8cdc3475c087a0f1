"""Errors thrown in each phase: the run survives, or ends with a message and continues as if it had not happened."""

import math
from typing import Any

from tests.campaign.faults import Fault
from tests.campaign.lab import Lab, Program
from tests.campaign.tally import Tally

_EXPECTED_STATUS = {
    "RuntimeError": (1,),
    "OSError": (1,),
    "DiskFull": (1,),
    "OutOfMemoryError": (0, 1),
    "KeyboardInterrupt": (130,),
}
_MAY_SHOW_ONE_TRACEBACK = ("RuntimeError", "OSError")
"""What nobody foresaw keeps the one traceback that shows where it is; the others are said in words."""
_WRITES = ("_checkpoint", "append_metrics", "write_evaluation", "summarise", "sync_adapter")
_USES_THE_GPU = ("PolicySampler.__call__", "RolloutScorer.__call__", "VLLMGenerator._run", "Canary.check")
_STEP_IS_REPEATED = ("TransformersGenerator._sample", "score_spans", "_compute_loss", "compute_loss")
"""Where memory runs out in earnest: in a forward pass. The step is repeated there."""
_ROUNDED: dict[str, Any] = {"but_for": ["*/memory_limits.json", "*.parquet"], "tolerance": math.inf}
"""What is compared of a run that took a step in smaller parts: its files and steps. In bfloat16 sums in another order
are magnified by optimizer and sampling; that the step is the same in float32, tests/test_out_of_memory.py shows."""


def throw_and_continue(lab: Lab, tally: Tally, program: Program, num_errors: int) -> None:
    rng = lab.random(f"errors {program.name}")
    counts = lab.reference(program).counts
    cases = [(point, error) for point in program.points for error in _EXPECTED_STATUS if _can_happen(point, error)]
    rng.shuffle(cases)
    chosen = [cases[i % len(cases)] for i in range(num_errors)]
    faults = [Fault(point, rng.randint(1, counts[point]), action=f"raise:{error}") for point, error in chosen]
    lab.each(faults, lambda fault: _try(lab, tally, program, fault))


def _can_happen(point: str, error: str) -> bool:
    if error in ("DiskFull", "OSError"):
        return point.endswith(_WRITES)
    return point.endswith((*_USES_THE_GPU, *_STEP_IS_REPEATED)) if error == "OutOfMemoryError" else True


def _try(lab: Lab, tally: Tally, program: Program, fault: Fault) -> None:
    trial = lab.trial(program)
    error = fault.action.partition(":")[2]
    ended = trial.end(faults=[fault])
    problems = []
    expected = _EXPECTED_STATUS[error]
    if error == "OutOfMemoryError" and fault.point.endswith(_STEP_IS_REPEATED):
        expected = (0,)
    if ended.status not in expected:
        problems.append(f"status {ended.status} and not {expected}:\n{ended.last_lines}")
    if ended.num_tracebacks > (error in _MAY_SHOW_ONE_TRACEBACK):
        problems.append(f"{ended.num_tracebacks} tracebacks:\n{ended.last_lines}")
    if ended.status != 0:
        problems += trial.continued()
    elif error == "OutOfMemoryError":
        problems += trial.differences(**_ROUNDED)
    else:
        problems.append("nothing happened")
    tally.count(f"{program.name}, {trial.folder}, {fault}", problems)
    if not problems:
        trial.remove()
