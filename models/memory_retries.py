"""MemoryRetries: what ran out of memory is repeated with half as much at once."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

from core.faults import first_line, is_out_of_memory, note_phase
from core.log import log
from core.types import Phase
from models.meter import PhaseMeter

T = TypeVar("T")


class MemoryRetries:
    """Repeats work that ran out of memory with half as much at once, and remembers how much fitted; one for a run.

        loss = retries(Phase.TRAIN, 36_864, lambda max_tokens: loss_and_backward(max_tokens))

    A repetition starts as the first attempt did: random generators are set back, and tensors of the failed attempt are
    gone, its frames included. What else an attempt leaves behind (gradients), the work itself clears as it begins.

    Args:
        meter: of the run; an error that is not survived remembers the phase and what was measured in it.
        max_retries: repetitions of a phase over the run; at the next error of memory there, that error is raised.
    """

    def __init__(self, meter: PhaseMeter, *, max_retries: int) -> None:
        self.meter, self.max_retries = meter, max_retries
        self.limits: dict[Phase, int] = {}
        """At most this much at once, as the run found out; absent: as the plan has it."""
        self.num_retries: Counter[Phase] = Counter()
        self.never_repeated: set[Phase] = set()
        """Phases whose work cannot be taken back."""

    def __call__(
        self,
        phase: Phase,
        at_once: int,
        work: Callable[[int], T],
        *,
        taken: Callable[[int], int] | None = None,
        smallest: int = 1,
        unit: str = "tokens",
    ) -> T:
        """What `work(limit)` returns, `limit` being `at_once` or the less that was found to fit.

        Args:
            at_once: how much the work may take at once where memory allows.
            taken: limit -> how much it really takes at once, which is what is halved; None: all of the limit.
            smallest: what cannot be divided (one row). Work that fails with so little is repeated as it is, with the
                caches freed.
        """
        while True:
            limit = max(min(at_once, self.limits.get(phase, at_once)), min(smallest, at_once))
            random_state = _random_state(self.meter.device)
            try:
                return work(limit)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.num_retries[phase] >= self.max_retries or phase in self.never_repeated:
                    self.meter.mark()
                    note_phase(error, phase, self.meter.peak_bytes(phase), self.num_retries[phase])
                    raise
                why = first_line(error)
            # Only here, where the error is gone, its frames are too, and with them the tensors of the failed attempt.
            self._shrink(phase, limit if taken is None else min(limit, taken(limit)), smallest, unit, why)
            self._free()
            _set_random_state(self.meter.device, random_state)

    def _shrink(self, phase: Phase, size: int, smallest: int, unit: str, why: str) -> None:
        self.num_retries[phase] += 1
        what = "again, as these cannot be divided"
        if size > smallest:
            self.limits[phase] = max(size // 2, smallest)
            what = f"{self.limits[phase]} at once from now on"
        log.warning(
            "out of memory (%s) with %d %s at once: %s, retry %d of %d. %s",
            *(phase, size, unit, what, self.num_retries[phase], self.max_retries, why),
        )

    def _free(self) -> None:
        gc.collect()
        if self.meter.device.type == "cuda":
            torch.cuda.empty_cache()


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
