"""Paired timing: the sides of a comparison take turns in one process, and the least of their repeats counts."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def paired_seconds(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Least seconds of each side over `repeats` rounds, in which each runs once; a first round warms up.

    The clock is this process's CPU time, all threads together, which other work on the machine hardly changes; give
    `time.perf_counter` where a GPU computes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + warm_up):
        for name, side in sides.items():
            start_s = clock()
            side()
            seconds[name].append(clock() - start_s)
    return {name: min(values[warm_up:]) for name, values in seconds.items()}
