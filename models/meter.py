"""PhaseMeter: seconds and peak memory of a run, phase by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch

from core.faults import note_phase
from core.types import Phase, UnmappedMemory


@dataclass(slots=True)
class PhaseUse:
    """Time and peak memory of a phase so far. On a CPU the first two peaks are the process's RSS, the third is 0."""

    seconds: float = 0.0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_driver_bytes: int = 0
    """All that was in use on the GPU as the driver reports it: CUDA's context, graphs and other processes too."""


class PhaseMeter:
    """Seconds and peak memory by phase; one for a run. Phases nest: both go to the innermost one that is open.

    `unmapped_memory` says what torch's counters hold of an engine that is not on the GPU; an engine's owner sets it.
    `clock` may be this process's CPU time, which other work on the machine hardly changes.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.unmapped_memory: Callable[[], UnmappedMemory] = UnmappedMemory
        self.use: dict[Phase, PhaseUse] = {phase: PhaseUse() for phase in Phase}
        self.open_phases: list[Phase] = []
        self._recent_peak = PhaseUse()
        self._last_mark_s = clock()
        self._unmapped_at_mark = UnmappedMemory()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self.mark()
        self.open_phases.append(phase)
        try:
            yield
        except Exception as error:
            self.mark()
            note_phase(error, phase, self.peak_bytes(phase))
            raise
        finally:
            self.mark()
            self.open_phases.pop()

    def mark(self) -> None:
        """Charge the time and memory since the last mark to the innermost open phase, and start a new interval.

        Whoever puts an engine to sleep or wakes it marks before.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = self.clock()
        if self.open_phases:
            use, peak = self.use[self.open_phases[-1]], self._interval_peak()
            use.seconds += now_s - self._last_mark_s
            for seen in (use, self._recent_peak):
                seen.peak_allocated_bytes = max(seen.peak_allocated_bytes, peak.peak_allocated_bytes)
                seen.peak_reserved_bytes = max(seen.peak_reserved_bytes, peak.peak_reserved_bytes)
                seen.peak_driver_bytes = max(seen.peak_driver_bytes, peak.peak_driver_bytes)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._unmapped_at_mark = self.unmapped_memory()
        self._last_mark_s = now_s

    def _interval_peak(self) -> PhaseUse:
        """Peaks since the last mark; on a CPU the resident set now.

        torch's counters go on counting what a sleeping engine has unmapped (vllm#17117), so on a GPU

            peak reserved = max_memory_reserved - bytes unmapped throughout the interval     (allocated alike)
            peak of the driver = used now + max_memory_reserved - memory_reserved

        Unmapped throughout is the smaller of the figures at the interval's two ends. `ModelHost` marks before each
        change of the engine, and empties the trainer's cache before the mark that precedes a wake-up: so nothing is
        counted beside the awake engine that was gone before it woke.
        """
        if self.device.type != "cuda":
            resident = psutil.Process().memory_info().rss
            return PhaseUse(peak_allocated_bytes=resident, peak_reserved_bytes=resident)
        before, now = self._unmapped_at_mark, self.unmapped_memory()
        reserved = torch.cuda.max_memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return PhaseUse(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self.device)
            - min(before.allocated_bytes, now.allocated_bytes),
            peak_reserved_bytes=reserved - min(before.reserved_bytes, now.reserved_bytes),
            peak_driver_bytes=total - free + reserved - torch.cuda.memory_reserved(self.device),
        )

    def peaks(self) -> dict[Phase, int]:
        """Peak bytes of each phase up to the last mark, by the driver's count on a GPU; the device is not asked."""
        return {phase: self.peak_bytes(phase) for phase in self.use}

    def peak_bytes(self, phase: Phase) -> int:
        """As `peaks`, of one phase."""
        use = self.use[phase]
        return use.peak_driver_bytes or use.peak_reserved_bytes

    def take_recent_peak(self) -> PhaseUse:
        """The peaks over all phases since the last call."""
        self.mark()
        recent, self._recent_peak = self._recent_peak, PhaseUse()
        return recent

    def checkpoint_use(self) -> dict[Phase, PhaseUse]:
        """A copy of what each phase took so far, the open interval included."""
        self.mark()
        return {phase: replace(use) for phase, use in self.use.items()}
