"""The embedded weak student: names, cache folder, seeds and the gate."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.embedded import student
from data.embedded.task import generate_rows
from models.load import load_tokenizer, resolve_model_path
from planner.shapes import load_shape
from schemas.model import ModelArgs, embedded_student_seed, is_embedded


@pytest.fixture
def quick(monkeypatch):
    """A student of two steps, whatever it solves."""
    for name in ("_NUM_FACTS_STEPS", "_NUM_SHORT_STEPS"):
        monkeypatch.setattr(student, name, 1)
    monkeypatch.setattr(student, "sampled_accuracy", lambda model, tokenizer, rows: 0.0)


@pytest.mark.parametrize(
    ("name", "seed"),
    [("tiny_student", 0), ("tiny_student_0", 0), ("tiny_student_17", 17)]
    + [(name, None) for name in ("tiny", "tiny_student_", "tiny_student_x", "my/tiny_student", "tiny_student_-1")],
)
def test_a_name_says_which_student_is_meant(name, seed):
    assert embedded_student_seed(name) == seed
    assert is_embedded(name) == (seed is not None or name == "tiny")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(quick, tmp_path):
    state = torch.get_rng_state()
    weights = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        student.build_weak_student(tmp_path / folder, seed)
        weights.append(load_file(tmp_path / folder / "model.safetensors"))
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_seed_is_made_once_in_the_cache_and_its_shape_is_known_before(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("RLT_CACHE", str(tmp_path))
    shape = load_shape("tiny_student_2")
    assert load_tokenizer("tiny_student_2", ModelArgs()).get_vocab() == student.build_tokenizer().get_vocab()
    assert not list(tmp_path.iterdir())
    path = resolve_model_path("tiny_student_2")
    monkeypatch.setattr(student, "build_weak_student", lambda folder, seed: pytest.fail("made again"))
    assert resolve_model_path("tiny_student_2") == path
    assert [str(folder) for folder in tmp_path.iterdir()] == [path]
    assert load_shape(path).num_params == shape.num_params
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters()) == shape.num_params


def test_a_student_that_is_not_weak_is_refused_and_leaves_nothing(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "sampled_accuracy", lambda model, tokenizer, rows: student.MAX_WEAK_ACCURACY)
    with pytest.raises(RuntimeError, match=r"solves 0\.20 .*allowed: 0\.2"):
        student.ensure_weak_student(0, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_weak_student_answers_in_the_format_and_is_right_by_chance(tmp_path):
    student.build_weak_student(tmp_path, 5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = generate_rows(400, seed=77, split="eval")
    assert model.dtype == torch.bfloat16
    assert student.sampled_accuracy(model, tokenizer, rows) < student.MAX_WEAK_ACCURACY
    ten_answers = sum(
        student.sampled_accuracy(model, tokenizer, [row | {"solution": f"={digit}"} for row in rows])
        for digit in range(10)
    )
    assert ten_answers == pytest.approx(1, abs=0.1)  # it writes one digit as its solution, nearly always
