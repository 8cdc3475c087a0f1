"""Datasets too small to hold a question out: they train, and one line says that nothing is evaluated."""

import json
import logging
from pathlib import Path

import pytest

from core.log import log
from preflight.hardware import check_hardware_and_plan
from runs.metrics import METRICS_FILE
from runs.summary import summarise
from schemas.run import load_run_config
from tests.helpers.tiny_diffusion import diffusion_values
from tests.helpers.tiny_run import make_trainer, write_random_model
from trainers.masked_diffusion_run import train_masked_diffusion

FOUR_QUESTIONS = [{"question": f"{i}+{i}", "solution": f"={2 * i}"} for i in range(4)]
ONE_QUESTION_OFTEN = [{"question": "1+1", "solution": "=2"}] * 12
FOUR_TEXTS = [{"text": letter * 50} for letter in "abcd"]


def write(folder: Path, rows: list[dict[str, str]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def warnings_said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger="rlt")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_trained_without_evaluation(run_dir: Path, num_steps: int) -> None:
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    assert sum("loss" in line for line in lines) == num_steps
    assert not [key for line in lines for key in line if key.startswith("eval_")]


@pytest.mark.parametrize(
    ("rows", "said"), [(FOUR_QUESTIONS, "4 distinct questions: "), (ONE_QUESTION_OFTEN, "1 distinct question: ")]
)
def test_a_teacher_trains_on_it(rows, said, tmp_path, warnings_said):
    model, run = write_random_model(tmp_path / "model"), tmp_path / "run"
    words = ("eval_on_start=true", "eval_strategy=steps", "eval_steps=1", "num_eval_prompts=64", "max_steps=2")
    trainer = make_trainer(model, run, f"dataset_id_or_path={write(tmp_path, rows)}", *words)
    trainer.train()
    trainer.finish()
    assert_trained_without_evaluation(run, num_steps=2)
    assert not [key for key in summarise(run, {}) if key.startswith("eval_")]
    (line,) = warnings_said()
    assert line.startswith(said) and line.endswith("nothing is evaluated") and "\n" not in line


@pytest.mark.parametrize(
    ("rows", "objective", "said"),
    [
        (FOUR_QUESTIONS, "sft", "4 distinct questions: "),
        (ONE_QUESTION_OFTEN, "sft", "1 distinct question: "),
        (FOUR_TEXTS, "pretrain", "4 texts: "),
    ],
)
def test_a_masked_diffusion_model_trains_on_it(rows, objective, said, tmp_path, warnings_said):
    words = [f"dataset_id_or_path={write(tmp_path, rows)}", f"objective={objective}", "packing=false", "max_steps=2"]
    words += ["train_batch_size=4", "per_device_train_batch_size=4", "logging_steps=1", "num_eval_prompts=64"]
    values = diffusion_values(tmp_path / "run", "eval_on_start=true", "eval_steps=1", *words)
    config = load_run_config(values)
    train_masked_diffusion(config, values, *check_hardware_and_plan(config), lambda finished: None)
    assert_trained_without_evaluation(tmp_path / "run", num_steps=2)
    assert [line.startswith(said) and line.endswith("nothing is evaluated") for line in warnings_said()] == [True]
