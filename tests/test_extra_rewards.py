"""Format and correctness rewards."""

import pytest

from data.tags import TAG_STYLES
from rewards.correctness import CorrectnessReward, final_answer, same_answer
from rewards.format import FormatReward

TAGS = TAG_STYLES["bespoke"]
CLOSE = TAGS.explanation.closing


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (f"because{CLOSE}", 1.0),
        (f"because{CLOSE}\n", 1.0),
        ("because", 0.0),
        (f"\n\n{CLOSE}", 0.0),
        (f"because{CLOSE} and more", 0.0),
        (f"because{CLOSE}{CLOSE}", 0.0),
        (f"{TAGS.explanation.opening}because{CLOSE}", 0.0),
        (f"because {TAGS.thought.closing}{CLOSE}", 0.0),
    ],
)
def test_format_reward_wants_one_closed_explanation_and_nothing_else(completion: str, reward: float) -> None:
    assert FormatReward(TAGS)(prompts=["p"], completions=[completion]) == [reward]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1+2=3;", "3"),
        ("5-3=2. So it is 12.", "12"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} of 7", r"\frac{1}{2}"),
        (r"\boxed{4} and \boxed{unclosed", "4"),
        ("x2 and no number", None),
        ("1,250.5 apples", "1,250.5"),
    ],
)
def test_final_answer_is_the_last_box_else_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("12.0", "12", True), ("1/2", "0.5", True), ("1,000", "1000", True), ("12", "13", False), ("1/0", "1/0", True)]
    + [(r"$ x + 1 $", "x+1", True), ("-3", "3", False)],
)
def test_answers_are_compared_as_numbers_where_they_are_numbers(first: str, second: str, same: bool) -> None:
    assert same_answer(first, second) == same


def test_correctness_reward_reads_the_explanation_only() -> None:
    completions = [f"1+2=3;{CLOSE} 4", f"1+2=4;{CLOSE} 3", f"no number{CLOSE}"]
    assert CorrectnessReward(TAGS)(completions, solution=["=3"] * 3) == [1.0, 0.0, 0.0]
