"""PolicySampler: completions of the current policy, from a generator that got its adapter and passed the canary.

Letters: P prompts, G completions per prompt, B = P * G rows (prompt-major).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from core.types import Phase
from generation.base import Generator
from generation.canary import Canary
from models.host import ModelHost
from rollout.types import Completion, Group, Rollout

TRAIN_STREAM, EVAL_STREAM, TRACE_STREAM = 0, 1, 2
"""Streams of seeds."""
_PREFETCH_FRAC = 0.9
"""Share of the rows that are finished when a parked student begins to come back."""


def sampling_seeds(seed: int, *, stream: int, step: int, num_rows: int) -> list[int]:
    """[B] one 32-bit seed per row, from (seed, stream, step, row) alone, so that a resumed run repeats itself."""
    return [int(np.random.SeedSequence([seed, stream, step, row]).generate_state(1)[0]) for row in range(num_rows)]


def with_completions(groups: Sequence[Group], completions: Sequence[Completion]) -> Rollout:
    """The groups with [B] completions, the same number for each."""
    num_generations = len(completions) // len(groups)
    return Rollout(
        groups=tuple(
            replace(group, completions=tuple(completions[p * num_generations : (p + 1) * num_generations]))
            for p, group in enumerate(groups)
        )
    )


class PolicySampler:
    """Samples the host's teacher: the adapter is swapped in where it changed, and the canary asked, before each call.

    Args:
        host: owns the teacher; the generator is awake while it samples.
        canary: compares generator and teacher after every swap and wake-up.
        seed: the run's.
        on_progress: called with (what, done, total).
    """

    def __init__(
        self,
        host: ModelHost,
        generator: Generator,
        canary: Canary,
        *,
        seed: int,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.host, self.generator, self.canary = host, generator, canary
        self._seed, self._on_progress = seed, on_progress
        self.synced_version: int | None = None
        """Of the adapter that the generator holds; None where that is not known."""

    def __call__(
        self, groups: Sequence[Group], num_generations: int, *, stream: int, step: int, version: int
    ) -> Rollout:
        """`num_generations` completions for each group, drawn from seeds of (stream, step); `version` as in `sample`.

        Raises:
            CanaryError: the generator does not hold the policy.
        """
        num_rows = len(groups) * num_generations
        seeds = sampling_seeds(self._seed, stream=stream, step=step, num_rows=num_rows)
        return self.sample(groups, num_generations, seeds, version=version)

    def sample(self, groups: Sequence[Group], num_generations: int, seeds: Sequence[int], *, version: int) -> Rollout:
        """`num_generations` completions for each group, row by row from `seeds`.

        `version` names the adapter as it is now, e.g. by the optimizer steps that made it.

        Raises:
            CanaryError: the generator does not hold the policy.
        """
        with self.host.phase(Phase.GENERATE):
            with self.host.phase(Phase.SYNC):
                if self.synced_version != version:
                    self.generator.sync_adapter(self.host.teacher)
                    self.synced_version = version
                self.host.check_shared_base()
                self.canary.check()
            completions = self.generator.generate(
                [group.prompt_ids for group in groups],
                num_generations,
                seeds,
                on_progress=self._generated,
            )
        return with_completions(groups, completions)

    def _generated(self, num_done: int, num_rows: int) -> None:
        """The few rows that are left take a while: what scores next comes to the GPU beside them."""
        self._on_progress("generating", num_done, num_rows)
        if num_done >= _PREFETCH_FRAC * num_rows:
            self.host.prefetch_student()
