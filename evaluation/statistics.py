"""Statistics of an evaluation: pass@k without bias, and bootstrap intervals over questions.

Letters: Q questions, S samples of a question, R resamplings.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb

import numpy as np

NUM_RESAMPLINGS = 10_000
COVERAGE_FRAC = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over questions with the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, k drawn without replacement from those that were made.

    1 - C(n - c, k) / C(n, k) with c of n right (Chen et al. 2021, arXiv 2107.03374, equation 1): its mean over draws of
    the n samples is exactly the chance for k fresh ones, which that of `1 - (1 - c / n) ** k` is not.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def which_k(num_samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return [*powers, num_samples]


def bootstrap(values_Q: Sequence[float], seed: int) -> Interval:
    """The mean, and the percentile bootstrap's interval of it (Efron and Tibshirani 1993, chapter 13).

    Questions are drawn with replacement, each with all of its samples. Two models that answered the same questions are
    compared by the interval of their differences question by question.
    """
    values, counts = np.unique(np.asarray(values_Q, dtype=np.float64), return_counts=True)
    num_questions = int(counts.sum())
    if not num_questions:
        raise ValueError("no questions")
    # How often each distinct value is drawn, which is all that the mean depends on.
    drawn = np.random.default_rng(seed).multinomial(num_questions, counts / num_questions, size=NUM_RESAMPLINGS)
    means = drawn @ values / num_questions
    tail = (1.0 - COVERAGE_FRAC) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(np.mean(values_Q)), float(low), float(high))
