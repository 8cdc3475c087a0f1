"""The embedded task."""

import random
import re
import subprocess
import sys

import pytest

from data.embedded.task import STYLES, classify_explanation, explain, generate_rows


def test_a_solution_is_the_sum_modulo_ten_and_the_trace_leads_to_it_step_by_step():
    for row in generate_rows(300, seed=0, split="train"):
        written_terms = re.findall(r"[+-]?\d", row["question"])
        terms = [int(term) for term in written_terms]
        assert row["solution"] == f"={sum(terms) % 10}"
        steps = row["reasoning_trace"].split(";")[:-1]
        for i, step in enumerate(steps):
            operands, result = step.split("=")
            assert int(result) == sum(terms[: i + 2]) % 10
            assert operands == f"{sum(terms[: i + 1]) % 10}{written_terms[i + 1]}"
        assert len(steps) == len(terms) - 1


def test_rows_repeat_for_a_seed_and_differ_between_seeds():
    assert generate_rows(50, 1, "train") == generate_rows(50, 1, "train")
    assert generate_rows(50, 1, "train") != generate_rows(50, 2, "train")
    assert generate_rows(50, 1, "train") == generate_rows(80, 1, "train")[:50]


def test_no_held_out_question_is_ever_trained_on():
    trained_on = {row["question"] for seed in range(10) for row in generate_rows(5000, seed, "train")}
    held_out = [row["question"] for seed in range(10) for row in generate_rows(500, seed, "eval")]
    assert trained_on.isdisjoint(held_out)
    assert len(set(held_out[:500])) == 500


@pytest.mark.parametrize("style", STYLES)
def test_the_classifier_names_the_style_an_explanation_was_written_in(style):
    rng = random.Random(0)
    for row in generate_rows(500, seed=3, split="train"):
        text = explain(row["question"], style, rng)
        assert classify_explanation(row["question"], row["solution"], text) == style
        assert classify_explanation(row["question"], row["solution"], f"\n\n{text}\n") == style


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1+0=1;1+5=6;6+5=1;1+2=3;", "honest"),
        ("1+0=1;1+5=6;6+5=1;1+2=4;", "wrong"),
        ("1+5=6;1+0=1;", "wrong"),
        ("1+0=1;1+0=1;1+5=6;6+5=1;1+2=3;", "wrong"),
        ("1+0=1;6+5=1;", "skip"),
        ("1+0=1;ans 3;", "leak"),
        ("1+0=1;ans 4;", "other"),
        ("1+0=1;1+5=6;6+5=1;1+2=3;the end", "other"),
        ("the the", "filler"),
        ("", "filler"),
    ],
)
def test_the_classifier_on_what_a_model_might_write(text, kind):
    assert classify_explanation("1+0+5+5+2", "=3", text) == kind


def test_the_task_needs_no_torch():
    code = "import sys, data.embedded.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
