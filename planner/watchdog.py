"""Growth watchdog: the trend of peak memory over the steps, and when it would reach the GPU's limit."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WARM_UP_STEPS = 3
"""Steps whose growth is expected: optimizer states, CUDA graphs, the allocator's first blocks."""
MIN_STEPS = 8
"""Steps after the warm-up before a trend is spoken of."""
WINDOW_STEPS = 64
"""The trend is that of the last steps."""


@dataclass(frozen=True, kw_only=True)
class GrowthForecast:
    kind: str
    """`allocated` or `reserved`."""
    bytes_per_step: float
    out_of_memory_step: int

    @property
    def message(self) -> str:
        return (
            f"{self.kind} memory grows by {self.bytes_per_step / 1e6:.1f} MB per step: "
            f"at this rate out of memory at about step {self.out_of_memory_step}"
        )


@dataclass
class GrowthWatchdog:
    """Collects peaks per step and warns while a steady growth leads to the limit within the run.

    `observe` returns a forecast at most once per doubling of the steps seen, `max_warnings` times in all.
    """

    limit_bytes: int
    max_steps: int
    max_warnings: int
    _peaks: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"allocated": [], "reserved": []})
    _num_warnings: int = 0
    _next_check_step: int = 0

    def observe(self, step: int, *, allocated_bytes: int, reserved_bytes: int) -> GrowthForecast | None:
        """Add a step's peaks; the nearer of the two forecasts, or None."""
        self._peaks["allocated"].append((step, allocated_bytes))
        self._peaks["reserved"].append((step, reserved_bytes))
        if step < self._next_check_step or self._num_warnings >= self.max_warnings:
            return None
        forecasts = [
            found
            for kind, peaks in self._peaks.items()
            if (found := forecast(kind, peaks, self.limit_bytes)) is not None
        ]
        within_run = [found for found in forecasts if found.out_of_memory_step <= self.max_steps]
        if not within_run:
            return None
        self._num_warnings += 1
        self._next_check_step = 2 * step
        return min(within_run, key=lambda found: found.out_of_memory_step)


def forecast(kind: str, peaks: Sequence[tuple[int, int]], limit_bytes: int) -> GrowthForecast | None:
    """The step at which a steady growth of `(step, bytes)` reaches the limit; None where there is none.

    Theil-Sen: the median of the slopes between all pairs of steps, which noise of single steps does not move. Growth
    counts as steady where both halves of the window grow, and where the window's growth exceeds three times the median
    distance from the line: lengths vary from step to step, so peaks do too.
    """
    window = list(peaks[WARM_UP_STEPS:])[-WINDOW_STEPS:]
    if len(window) < MIN_STEPS:
        return None
    slope = _median_slope(window)
    middle = len(window) // 2
    if min(slope, _median_slope(window[:middle]), _median_slope(window[middle:])) <= 0:
        return None
    intercept = statistics.median(size - slope * step for step, size in window)
    noise = statistics.median(abs(size - slope * step - intercept) for step, size in window)
    last_step = window[-1][0]
    if slope * (last_step - window[0][0]) <= 3 * noise:
        return None
    steps_left = max(0.0, (limit_bytes - (slope * last_step + intercept)) / slope)
    return GrowthForecast(kind=kind, bytes_per_step=slope, out_of_memory_step=last_step + round(steps_left))


def _median_slope(points: Sequence[tuple[int, int]]) -> float:
    return statistics.median(
        (later_size - size) / (later - step)
        for i, (step, size) in enumerate(points)
        for later, later_size in points[i + 1 :]
    )
