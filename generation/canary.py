"""Does the generator sample from the policy that is being trained?

Two failures are known elsewhere: an adapter that gets lost when an engine wakes up, and one that is not replaced by the
newer one. Both leave a generator that works and slowly ruins training. The canary compares log-probs of fixed probe
tokens between generator and trainer.

A difference in size alone does not show one stale step: the two sides differ by rounding (about 0.01 to 0.04 a token),
and an optimizer step may move log-probs by less. The direction does. With t the trainer's probe log-probs now, h those
under a suspected state (the adapter of the last check, or no adapter) and g the generator's, corrected by the
difference between generator and trainer at the last check,

    position = (g - h) . (t - h) / |t - h|^2

is 1 if the generator moved along with the trainer and 0 if it is still (or again) in the suspected state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import CanaryError
from generation.base import Generator

TrainerLogprobs = Callable[[Sequence[Sequence[int]], bool], list[list[float]]]
"""(rows, adapter on) -> log-probs at temperature 1, as `Generator.logprobs` returns them."""

Vector = NDArray[np.float64]

_NUM_STANDARD_ERRORS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryReading:
    """One passed check."""

    mean_abs_difference: float
    """mean |log p(generator) - log p(trainer)| over the probe tokens, in nats."""
    moved_along: bool
    """Whether the trainer moved far enough since the last snapshot to tell that the generator moved with it."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Log-probs of the probe tokens at a check."""

    generator: Vector
    trainer: Vector


class Canary:
    """Raises as soon as the probe log-probs show that the generator is not the policy.

    Call `check` after each wake-up and each swap. Where the trainer has moved too little since the last snapshot to
    tell, the snapshot is kept, so that movements add up until they can be told; nothing passes unseen for ever.
    """

    def __init__(
        self,
        generator: Generator,
        trainer_logprobs: TrainerLogprobs,
        rows: Sequence[Sequence[int]],
        tolerance: float,
    ) -> None:
        """`rows`: probe token ids; about 128 tokens of the kind that is trained on make one step visible.

        `tolerance`: largest mean |difference| to the trainer, for failures that are no known state.
        """
        self._generator = generator
        self._trainer_logprobs = trainer_logprobs
        self._rows = [list(row) for row in rows]
        self._tolerance = tolerance
        self._snapshot: _Snapshot | None = None
        self._without_adapter: Vector | None = None

    def check(self) -> CanaryReading:
        """Compare the generator with the trainer as it is now.

        Raises:
            CanaryError: the generator serves an older adapter, none, or other weights; says which it looks like.
        """
        if self._without_adapter is None:
            self._without_adapter = _flat(self._trainer_logprobs(self._rows, False))
        now = _Snapshot(
            generator=_flat(self._generator.logprobs(self._rows)),
            trainer=_flat(self._trainer_logprobs(self._rows, True)),
        )
        mean_abs_difference = float(np.abs(now.generator - now.trainer).mean())
        offset = 0.0 if self._snapshot is None else self._snapshot.generator - self._snapshot.trainer
        suspects = {"no adapter": self._without_adapter}
        if self._snapshot is not None:
            suspects["the adapter of an earlier step"] = self._snapshot.trainer
        moved_along = False
        for name, suspect in suspects.items():
            position, error = _position(now.generator - offset, suspect, now.trainer)
            if position + error < 0.5:
                raise CanaryError(
                    f"the generator ({self._generator.name}) serves {name}: its probe log-probs went {position:.2f} of "
                    f"the way from there to the trainer's (1 expected, +- {error:.2f}; mean difference "
                    f"{mean_abs_difference:.3f} nats)"
                )
            moved_along |= name != "no adapter" and position - error > 0.5
        if not mean_abs_difference <= self._tolerance:
            raise CanaryError(
                f"the generator ({self._generator.name}) is {mean_abs_difference:.3f} nats a token away from the "
                f"trainer (canary_tolerance={self._tolerance}) and in no known state: other weights, a scaled adapter "
                "or a broken kernel"
            )
        if self._snapshot is None or moved_along:
            self._snapshot = now
        return CanaryReading(mean_abs_difference=mean_abs_difference, moved_along=moved_along)


def _position(generator: Vector, suspect: Vector, trainer: Vector) -> tuple[float, float]:
    """Where `generator` lies on the line from `suspect` (0) to `trainer` (1), and how far that may be off.

    The error is four standard errors of the least-squares slope: rms distance from the line over |trainer - suspect|.
    """
    direction = trainer - suspect
    squared_length = float(direction @ direction)
    if squared_length == 0.0:
        return 0.5, np.inf
    position = float((generator - suspect) @ direction) / squared_length
    residual = generator - suspect - position * direction
    return position, _NUM_STANDARD_ERRORS * float(np.sqrt((residual @ residual) / len(residual) / squared_length))


def _flat(rows: Sequence[Sequence[float]]) -> Vector:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])
