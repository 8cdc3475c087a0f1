"""Correctness reward: whether an explanation arrives at the solution's final answer.

Meant for tasks with a short final answer (a number, or the content of `\\boxed{...}`). The RLT reward does not need it:
it is a check on the explanations that the RLT reward prefers.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from data.tags import TagStyle

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?!\w)")
_BOX = r"\boxed{"


def final_answer(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, else the last number; None where there is neither."""
    for start in reversed([match.end() for match in re.finditer(re.escape(_BOX), text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are equal: as numbers (`12.0`, `12`; `1/2`, `0.5`; `1,000`), else without spaces and `$`."""
    first, second = (re.sub(r"[\s$]|(?<=\d),(?=\d{3})", "", answer) for answer in (first, second))
    if _NUMBER.fullmatch(first) and _NUMBER.fullmatch(second):
        return _as_fraction(first) == _as_fraction(second)
    return first == second


def _as_fraction(number: str) -> Fraction | str:
    """A number that `_NUMBER` matches; the text itself where it divides by zero."""
    numerator, _, denominator = number.partition("/")
    divisor = Fraction(denominator or 1)
    return Fraction(numerator) / divisor if divisor else number


class CorrectnessReward:
    """1 where the explanation's final answer is the solution's, else 0: an entry of TRL's `reward_funcs`."""

    __name__ = "correctness_reward"

    def __init__(self, tags: TagStyle) -> None:
        self.tags = tags

    def __call__(self, completions: Sequence[str], solution: Sequence[str], **columns: Any) -> list[float]:
        """One reward per completion; `solution` is the dataset's column. A solution without a final answer gives 0."""
        rewards = []
        for completion, text in zip(completions, solution, strict=True):
            stated = final_answer(completion.partition(self.tags.explanation.closing)[0])
            wanted = final_answer(text)
            rewards.append(float(stated is not None and wanted is not None and same_answer(stated, wanted)))
        return rewards
