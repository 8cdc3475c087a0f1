"""Answers: what a sampled text gives as its solution, and whether that is the right one."""

import re
from functools import lru_cache

from data.tags import TAG_STYLES, TagStyle
from schemas.evaluate import Scoring

_LETTER = "[A-J]"
_LETTER_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"^[\s*$(]*({_LETTER})[*$]*(?:$|[).:,])",  # `C`, `(C)`, `**C**`, `C. because`; not `A car` or `I think`
        rf"(?i:answer|choice|option)(?i:\s+is)?[\s:*$(]*({_LETTER})\b",  # `the answer is (C)`
        rf"\(({_LETTER})\)",
    )
)
_MAX_MATH_CHARS = 2000
"""Beyond it no text is one answer, and reading it takes seconds."""
_MATH_MARKS = ("$", "\\boxed", "\\(", "\\[")


def stated_solution(text: str, tags: TagStyle) -> str | None:
    """The text between the first pair of solution tags; None where there is none."""
    _, opened, rest = text.partition(tags.solution.opening)
    content, closed, _ = rest.partition(tags.solution.closing)
    return content.strip() if opened and closed else None


def final_answer(text: str) -> str | None:
    """The last answer of a text without solution tags: what its last `\\boxed{...}` holds, else its last line.

    What a model thinks before it answers is left out, by the thought tags of any style.
    """
    for style in TAG_STYLES.values():
        text = text.rpartition(style.thought.closing)[2]
    if (boxed := last_boxed(text)) is not None:
        return boxed
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` or `\\fbox{...}` whose braces are closed."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def is_right(answer: str | None, solution: str, scoring: Scoring) -> bool:
    """Whether an answer is the solution; None, and what cannot be read, never is."""
    if answer is None:
        return False
    if scoring == "exact":
        return answer.strip() == solution.strip()
    if scoring == "letter":
        letter = stated_letter(answer)
        return letter is not None and letter == stated_letter(solution)
    return _same_value(answer, solution)


def stated_letter(answer: str) -> str | None:
    """The letter of a choice in `C`, `(C)`, `\\boxed{C}`, `\\text{C}`, `the answer is C`; None where there is none."""
    boxed = last_boxed(answer)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer if boxed is None else boxed).strip()
    for form in _LETTER_FORMS:
        if found := form.findall(text):
            return str(found[-1])
    return None


@lru_cache(maxsize=4096)  # samples of a question often agree
def _same_value(answer: str, solution: str) -> bool:
    """math-verify on what the last `\\boxed{...}` of each holds; it takes several boxes for a set of answers.

    It gives up on what takes longer than five seconds, such as towers of powers.
    """
    if len(math := _as_math(answer)) > _MAX_MATH_CHARS:
        return False
    from math_verify import parse, verify  # takes seconds, with sympy

    return bool(verify(parse(_as_math(solution)), parse(math)))


def _as_math(text: str) -> str:
    if (boxed := last_boxed(text)) is not None:
        return f"\\boxed{{{boxed}}}"
    is_bare = "\n" not in text.strip() and not any(mark in text for mark in _MATH_MARKS)
    return f"${text.strip()}$" if is_bare else text
