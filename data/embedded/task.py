"""The embedded task: sums of five digits worked out left to right modulo 10, with good and bad explanations.

`1+0+5+5+2` has the solution `=3`; its honest explanation is `1+0=1;1+5=6;6+5=1;1+2=3;`. The other styles of explanation
are what a careless teacher writes: the base model starts out as one, and the run's report says how often each occurs.
"""

import random
import re
import zlib
from typing import Literal, get_args

TEACHER_SYSTEM_SHORT = "Explain the solution."
STUDENT_SYSTEM_SHORT = "Think, then solve."

NUM_OPERATIONS = 4
Style = Literal["honest", "wrong", "skip", "leak", "filler"]
STYLES: tuple[Style, ...] = get_args(Style)
Split = Literal["train", "eval"]

_HELD_OUT_ONE_IN = 64  # of the 1.6 million questions
_FILLER_PHRASES = ("let us see;", "now we add;", "and so on;", "step by step;", "it is easy;")
_STEP = re.compile(r"\d[+-]\d=\d;")


def generate_rows(num_rows: int, seed: int, split: Split) -> list[dict[str, str]]:
    """Distinct rows with `question`, `solution` and `reasoning_trace` (the honest explanation), the same for each seed.

    A question belongs to one split by a hash of its text, so no seed can make the two overlap.
    """
    rng = random.Random(f"{split} {seed}")
    questions: dict[str, None] = {}
    while len(questions) < num_rows:
        question = _draw_question(rng)
        if (zlib.crc32(question.encode()) % _HELD_OUT_ONE_IN == 0) == (split == "eval"):
            questions[question] = None
    return [_row(question, rng) for question in questions]


def generate_short_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Rows as those of `generate_rows`, of one or two operations instead of `NUM_OPERATIONS`; some occur twice."""
    rng = random.Random(f"short {seed}")
    return [_row(_draw_question(rng, rng.choice((1, 2))), rng) for _ in range(num_rows)]


def _row(question: str, rng: random.Random) -> dict[str, str]:
    return {"question": question, "solution": solve(question), "reasoning_trace": explain(question, "honest", rng)}


def generate_facts() -> list[tuple[str, str]]:
    """All sums of two digits, as a text and how it goes on: (`3-7=`, `6`)."""
    return [
        (f"{a}{sign}{b}=", str((a + int(f"{sign}{b}")) % 10)) for a in range(10) for sign in "+-" for b in range(10)
    ]


def solve(question: str) -> str:
    """`1+0+5+5+2` -> `=3`."""
    return f"={_steps(question)[-1][-2]}"


def explain(question: str, style: Style, rng: random.Random) -> str:
    """An explanation in the given style; `classify_explanation` names the style again."""
    steps = _steps(question)
    match style:
        case "honest":
            return "".join(steps)
        case "wrong":
            slip_at, slip = rng.randrange(NUM_OPERATIONS), rng.randrange(1, 10)
            return "".join(_steps(question, slip_at, slip))
        case "skip":
            kept = sorted(rng.sample(range(NUM_OPERATIONS), rng.randrange(1, NUM_OPERATIONS)))
            return "".join(steps[i] for i in kept)
        case "leak":
            return f"ans {steps[-1][-2]};"
        case "filler":
            return "".join(rng.sample(_FILLER_PHRASES, rng.randrange(2, 4)))


def classify_explanation(question: str, solution: str, text: str) -> Style | Literal["other"]:
    """What kind of explanation a teacher wrote.

    honest: every step of the sum, right; skip: some of them; wrong: well-formed steps that are not the sum's;
    leak: states the solution's digit outside of any step; filler: no digit at all, so nothing that could help (an empty
    explanation too); other: the rest.
    """
    text = text.strip()
    steps = _STEP.findall(text)
    outside = _STEP.sub("", text)
    if not any(character.isdigit() for character in text):
        return "filler"
    if outside:
        return "leak" if solution.removeprefix("=") in outside else "other"
    honest = _steps(question)
    if steps == honest:
        return "honest"
    remaining = iter(honest)
    return "skip" if all(step in remaining for step in steps) else "wrong"


def _draw_question(rng: random.Random, num_operations: int = NUM_OPERATIONS) -> str:
    digits = [str(rng.randrange(10)) for _ in range(num_operations + 1)]
    return digits[0] + "".join(rng.choice("+-") + digit for digit in digits[1:])


def _steps(question: str, slip_at: int | None = None, slip: int = 0) -> list[str]:
    """`a+b=c;` for each operation; the result of step `slip_at` is off by `slip`, and so is all that follows."""
    steps = []
    value = int(question[0])
    for i, (sign, digit) in enumerate(zip(question[1::2], question[2::2], strict=True)):
        result = (value + int(sign + digit) + (slip if i == slip_at else 0)) % 10
        steps.append(f"{value}{sign}{digit}={result};")
        value = result
    return steps
