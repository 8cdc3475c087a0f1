"""The embedded run from end to end, as a newcomer starts it."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from data.embedded.tokenizer import build_tokenizer
from data.formats import encode
from schemas.compose import CONFIG_ROOT

pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ROOT = CONFIG_ROOT.parent


def train(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "--config-name=teacher_rlt_tiny", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def assert_learned(summary: dict) -> None:
    assert summary["reward"]["after"] - summary["reward"]["before"] >= 0.6
    likelihood = summary["eval_solution_log_prob"]
    assert likelihood["after"] - likelihood["before"] >= 0.35
    assert summary["eval_format_rate"]["after"] >= 0.95
    assert summary["eval_explanation_tokens"]["after"] >= 10


def test_the_default_run_learns_and_generator_and_trainer_agree(tmp_path):
    done = train(tmp_path, "seed=5")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "results/teacher_rlt_tiny/summary.json").read_text())
    assert_learned(summary)
    assert summary["logp_difference"] < 0.05
    assert "explanations: honest" in done.stdout and "change" in done.stdout
    log_file = (tmp_path / "results/teacher_rlt_tiny/logs/training.log").read_text().splitlines()
    assert log_file[1:] == [line.rstrip() for line in done.stdout.splitlines()]
    assert sum(line.count("  RAM ") for line in log_file) == 60
    assert not (tmp_path / "results/teacher_rlt_tiny/generator_base").exists()
    assert_reported(tmp_path / "results/teacher_rlt_tiny")


def assert_reported(run: Path) -> None:
    """The report is there, and the tokens of a row make up its explanation and the terms of its reward."""
    assert '"title":"Learned"' in (run / "report.html").read_text()
    names = [file.name for folder in ("completions", "evaluations") for file in sorted((run / folder).iterdir())]
    assert [file.name for file in sorted((run / "token_scores").iterdir())] == names and len(names) == 62
    table = pd.read_parquet(run / "completions/completions_00060.parquet")
    tokens = pd.read_parquet(run / "token_scores/completions_00060.parquet").set_index("row")
    assert sorted(tokens.index) == list(range(64))
    for row, kept in tokens.iterrows():
        assert "".join(kept["explanation_tokens"]) == table["explanation"][row]
        assert "".join(kept["solution_tokens"]) == table["solution"][row]
        assert kept["solution_log_prob"].mean() == pytest.approx(table["answer_log_prob_mean"][row], abs=1e-4)
        if not table["explanation"][row]:  # costs a fixed score in place of its KL
            continue
        assert kept["explanation_kl"].mean() == pytest.approx(table["reasoning_kl_mean"][row], abs=1e-4)


@needs_vllm
@pytest.mark.parametrize("name", ["teacher_rlt_tiny", "teacher_rlt_tiny_qlora"])
@pytest.mark.parametrize("words", [pytest.param((), marks=pytest.mark.long), ("max_steps=3", "eval_strategy=no")])
def test_a_run_on_one_base_in_memory_learns_and_exports_nothing(name, words, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"--config-name={name}", "generator=vllm", "seed=5"]
    command += ["generator_base=shared", "output_dir=run", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "in the trainer's memory" in done.stdout and summary["logp_difference"] < 0.05
    assert not (tmp_path / "run/generator_base").exists()
    if not words:
        assert_learned(summary)


def test_a_ten_line_file_of_ones_own_trains(tmp_path):
    rows = [{"question": f"What is {i} times three?", "solution": f"It is {3 * i}."} for i in range(10)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(tmp_path, "dataset_id_or_path=my.jsonl", "max_steps=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "results/teacher_rlt_tiny/metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(line) for line in lines) == 2


def write_long_rows(path: Path, num_rows: int = 300, min_len: int = 200, max_len: int = 600) -> None:
    """Sums whose length in tokens of the embedded tokenizer is spread evenly over the range."""
    tokenizer, draw, rows = build_tokenizer(), random.Random(0), []
    for i in range(num_rows):
        length = min_len + i * (max_len - min_len) // num_rows
        question = "+".join(str(draw.randint(0, 9)) for _ in range(length // 2))
        assert length - 2 <= len(encode(tokenizer, question)) <= length
        rows.append({"question": question, "solution": f"={i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@needs_vllm
def test_questions_that_fill_more_than_one_prefill_train_and_evaluate(tmp_path):
    write_long_rows(tmp_path / "long.jsonl")
    words = ["dataset_id_or_path=long.jsonl", "generator=vllm", "max_steps=1", "num_eval_prompts=16"]
    lengths = ["max_prompt_length=640", "max_completion_length=4", "canary_tolerance=0.5"]
    done = train(tmp_path, *words, *lengths)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = pd.read_parquet(tmp_path / "results/teacher_rlt_tiny/completions/completions_00001.parquet")
    tokenizer = build_tokenizer()
    assert sum(len(encode(tokenizer, prompt)) for prompt in set(table["prompt"])) > 2000
    lines = (tmp_path / "results/teacher_rlt_tiny/metrics.jsonl").read_text().splitlines()
    step = next(line for line in map(json.loads, lines) if "loss" in line)
    assert step["completions/clipped_ratio"] > 0.9 and step["sampling/logp_difference"] < 0.1


_SKIP_THE_THIRD_SWAP = """
import sys
from generation.vllm_engine import VLLMGenerator
from tests.helpers.tiny_run import make_trainer

swap, calls = VLLMGenerator.sync_adapter, []

def swap_unless_third(self, model):
    calls.append(model)
    if len(calls) != 3:
        swap(self, model)

VLLMGenerator.sync_adapter = swap_unless_third
trainer = make_trainer(
    "tiny", sys.argv[1], "generator=vllm", "train_batch_size=32", "num_generations=8", "max_completion_length=48",
    "max_steps=6", "learning_rate=2e-3", "eval_strategy=no", "canary_tolerance=0.15",
)
trainer.train()
"""


@needs_vllm
def test_a_swap_that_does_not_happen_stops_the_run(tmp_path):
    command = [sys.executable, "-c", _SKIP_THE_THIRD_SWAP, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "CanaryError" in done.stderr and "earlier" in done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
