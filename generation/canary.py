"""Canary: does the generator sample from the policy that is being trained?

Two failures are known elsewhere: an adapter that gets lost when an engine wakes up, and one that is not replaced by the
newer one. Both leave a generator that works and slowly ruins training. The canary compares log-probs of fixed probe
tokens between generator and trainer.

A difference in size alone does not show one stale step: the two sides differ by rounding (0.01 to 0.04 per token),
and an optimizer step may move log-probs by less. The direction does. With t the trainer's probe log-probs now, h those
in a suspected state (an earlier adapter, or none) and g the generator's, corrected by the difference between generator
and trainer at the earlier check,

    position = (g - h) . (t - h) / |t - h|^2

is 1 if the generator moved along with the trainer and 0 if it is still (or again) in the suspected state. Its standard
error says whether the trainer moved far enough to tell; the length of g - h says whether the generator stayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import CanaryError, NonFiniteError
from generation.base import Generator

TrainerLogprobs = Callable[[Sequence[Sequence[int]], bool], list[list[float]]]
"""(rows, adapter on) -> log-probs at temperature 1, as `Generator.logprobs` returns them."""

Vector = NDArray[np.float64]

_NUM_STANDARD_ERRORS = 5.0
# A generator that still serves the old adapter gives the old log-probs. One that serves the new adapter moved about as
# far as the trainer (at least 0.73 of the way in 110 readings of embedded runs), though not always in quite the same
# direction: LLM.int8's outlier columns come and go. So the distance tells the two apart.
_STAYED_BELOW = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryReading:
    """Figures of a passed check."""

    mean_abs_difference: float
    """mean |log p(generator) - log p(trainer)| over the probe tokens, in nats."""
    moved_along: bool
    """Whether the trainer moved far enough lately to tell that the generator moved with it."""


@dataclass(frozen=True, slots=True)
class _Check:
    """Log-probs of the probe tokens at one check."""

    generator: Vector
    trainer: Vector

    @property
    def offset(self) -> Vector:
        return self.generator - self.trainer


class Canary:
    """Check that raises as soon as the probe log-probs show that the generator is not the policy.

    Call `check` after each wake-up and each swap. Where the trainer has moved too little since the last check to tell,
    an older check is kept for comparison until the movements add up to enough: nothing passes unseen for ever.
    """

    def __init__(
        self,
        generator: Generator,
        trainer_logprobs: TrainerLogprobs,
        rows: Sequence[Sequence[int]],
        tolerance: float,
    ) -> None:
        """`rows`: probe token ids. 128 tokens show a step that moves log-probs by as much as rounding does.

        `tolerance`: largest mean |difference| to the trainer, for failures that are no known state.
        """
        self._generator = generator
        self._trainer_logprobs = trainer_logprobs
        self._rows = [list(row) for row in rows]
        self._tolerance = tolerance
        self._without_adapter: Vector | None = None
        self._last: _Check | None = None
        self._last_told: _Check | None = None
        """The last check since which the generator provably moved (or the first one)."""

    def check(self) -> CanaryReading:
        """Compare the generator with the trainer as it is now.

        Raises:
            CanaryError: the generator serves an older adapter, none, or other weights; says which it looks like.
            NonFiniteError: log-probs are not finite: the weights hold NaN, so there is nothing to compare.
        """
        if self._without_adapter is None:
            self._without_adapter = _flat(self._trainer_logprobs(self._rows, False))
        now = _Check(
            generator=_flat(self._generator.logprobs(self._rows)),
            trainer=_flat(self._trainer_logprobs(self._rows, True)),
        )
        for whose, values in (("trainer", now.trainer), (f"generator ({self._generator.name})", now.generator)):
            if not np.isfinite(values).all():
                raise NonFiniteError(f"the {whose} gives the canary's tokens log-probs that are not finite")
        mean_abs_difference = float(np.abs(now.offset).mean())
        self._refuse("no adapter", now, self._without_adapter, 0.0 if self._last is None else self._last.offset)
        moved_along = False
        for earlier in (self._last, self._last_told):
            if earlier is not None:
                moved_along = self._refuse("an earlier adapter", now, earlier.trainer, earlier.offset)
        if not mean_abs_difference <= self._tolerance:
            raise CanaryError(
                f"the generator ({self._generator.name}) is {mean_abs_difference:.3f} nats per token away from the "
                f"trainer (canary_tolerance={self._tolerance}) and in no known state: other weights, a scaled adapter "
                "or a broken kernel"
            )
        self._last = now
        if self._last_told is None or moved_along:
            self._last_told = now
        return CanaryReading(mean_abs_difference=mean_abs_difference, moved_along=moved_along)

    def _refuse(self, state: str, now: _Check, suspect: Vector, offset: Vector | float) -> bool:
        """Raise if the generator is in the suspected state; True if it provably is not, False if one cannot tell."""
        position, error = _position(now, suspect, offset)
        stayed = _mean_square(now.generator - offset - suspect) < _STAYED_BELOW**2 * _mean_square(now.trainer - suspect)
        if stayed and position + error < 1.0:
            raise CanaryError(
                f"the generator ({self._generator.name}) serves {state}: its probe log-probs went {position:.2f} +- "
                f"{error:.2f} of the way from there to the trainer's (1 expected; mean difference "
                f"{np.abs(now.offset).mean():.3f} nats)"
            )
        return position > 0.5 and position - error > 0.0


def _position(now: _Check, suspect: Vector, offset: Vector | float) -> tuple[float, float]:
    """Where the generator lies on the line from `suspect` (0) to the trainer (1), and how far that may be off.

    The error is five standard errors of the least-squares slope. Its noise per token is the rms distance from the line,
    but at least what rounding alone does: with a resolution r, a movement m < r shows as r in m / r of the tokens and
    as nothing in the others, a variance of r * m. The rms difference between generator and trainer stands for r.
    """
    direction = now.trainer - suspect
    squared_length = float(direction @ direction)
    if squared_length == 0.0:
        return 0.5, np.inf
    moved = now.generator - offset - suspect
    position = float(moved @ direction) / squared_length
    variance = max(
        _mean_square(moved - position * direction), np.sqrt(_mean_square(now.offset) * squared_length / len(moved))
    )
    return position, _NUM_STANDARD_ERRORS * float(np.sqrt(variance / squared_length))


def _mean_square(vector: Vector) -> float:
    return float(vector @ vector) / len(vector)


def _flat(rows: Sequence[Sequence[float]]) -> Vector:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])
