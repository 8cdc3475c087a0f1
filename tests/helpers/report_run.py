"""A run's folder made by hand, of any size and with any texts, by the writers that a run uses."""

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

from runs.metrics import METRICS_FILE, append_metrics
from runs.run_folder import COMPLETIONS_FOLDER, write_evaluation, write_summary, write_table
from runs.token_scores import write_token_scores
from schemas.compose import compose_run_config
from schemas.run import load_run_config, resolved_values

WORDS = re.findall(
    r"\S+", "the sum of two digits is added to what came before; then we take the last digit = 7 + 5 again"
)


def write_run(
    path: Path,
    *,
    num_steps: int = 12,
    num_prompts: int = 2,
    num_generations: int = 4,
    num_held_out: int = 10,
    num_words: int = 12,
    gain: float = 2.0,
    texts: list[str] | None = None,
    overrides: tuple[str, ...] = (),
    finished: bool = True,
    seed: int = 0,
) -> Path:
    """`gain`: by how much the held-out log-prob rises. `texts`: explanations that are used before made-up ones."""
    draw = random.Random(seed)
    path.mkdir(parents=True)
    composed = compose_run_config("teacher_rlt_tiny", [f"max_steps={num_steps}", *overrides])
    config = resolved_values(load_run_config(composed), composed)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "logs").mkdir()
    (path / "logs" / "training.log").write_text("19:00:00 INFO     generator: none\n19:00:01 WARNING  a warning\n")
    special = iter(texts or [])

    def row() -> dict[str, Any]:
        text = next(special, None)
        tokens = [word + " " for word in draw.choices(WORDS, k=num_words)] if text is None else list(text)[:500]
        return {
            "explanation": "".join(tokens) if text is None else text,
            "kind": draw.choice(["honest", "wrong"]),
            "reward": draw.gauss(-2, 1),
            "tokens": tokens,
        }

    _evaluate(path, 0, [row() for _ in range(num_held_out)], -3.0, draw)
    for step in range(1, num_steps + 1):
        rows = [row() for _ in range(num_prompts * num_generations)]
        _step(path, step, num_steps, rows, num_generations, draw)
    _evaluate(path, num_steps, [row() for _ in range(num_held_out)], -3.0 + gain, draw)
    if finished:
        write_summary(path, {"steps": num_steps})
    return path


def _step(
    path: Path, step: int, num_steps: int, rows: list[dict[str, Any]], num_generations: int, draw: random.Random
) -> None:
    figures = {
        "loss": draw.gauss(0, 0.1), "reward": -3 + 2 * step / num_steps + draw.gauss(0, 0.05), "reward_std": 0.5,
        "rlt/solution_log_prob_reward": -1.0, "rlt/kl_reward": -0.5, "rlt/match_reward": 0.0, "rlt/format_rate": 1.0,
        "rlt/unprocessed_thought_kl_mean": 0.2, "entropy": 0.5, "grad_norm": draw.random(), "learning_rate": 5e-4,
        "completions/mean_length": 20.5, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.0,
        "time/generate_s": 1 + draw.random(), "time/score_s": 0.5, "time/train_s": 1.5, "tokens_per_s/train": 12345.678,
        "memory/train_rss_gb": 1.25, "memory/train_predicted_gb": 1.5, "mine/figure": step / 3,
    }  # fmt: skip
    append_metrics(path / METRICS_FILE, step, figures)
    count = len(rows)
    questions = [f"question {step}.{i // num_generations}" for i in range(count)]
    table = {
        "step": [step] * count,
        "prompt": ["Please explain. " * 20] * count,
        "completion": [row["explanation"] + "</explanation>" for row in rows],
        "rlt": [row["reward"] for row in rows],
        "matched": [1.0] * count,
        "kl_reward": [draw.gauss(-1, 1) for _ in rows],
        "question": questions,
        "solution": [f"the answer {step}" for _ in rows],
        "explanation": [row["explanation"] for row in rows],
        "kind": [row["kind"] for row in rows],
        "advantage": [draw.gauss(0, 1) for _ in rows],
    }
    write_table(path / COMPLETIONS_FOLDER / f"completions_{step:05d}.parquet", table)
    write_token_scores(path, "completions", step, _tokens(rows, f"the answer {step}", draw))


def _evaluate(path: Path, step: int, rows: list[dict[str, Any]], log_prob: float, draw: random.Random) -> None:
    values = [log_prob + draw.gauss(0, 0.3) for _ in rows]
    if rows:
        figures = {"eval_solution_log_prob": sum(values) / len(values), "eval_reward": -1.0, "eval_format_rate": 1.0}
        append_metrics(path / METRICS_FILE, step, figures | {"eval_share/honest": 1.0})
    table = {
        "question": [f"held-out {i}" for i in range(len(rows))],
        "solution": ["the answer"] * len(rows),
        "explanation": [row["explanation"] for row in rows],
        "kind": [row["kind"] for row in rows],
        "reward": [row["reward"] for row in rows],
        "unprocessed_answer_log_prob_mean": values,
    }
    write_evaluation(path, step, table)
    write_token_scores(path, "evaluation", step, _tokens(rows, "the answer", draw))


def _tokens(rows: list[dict[str, Any]], solution: str, draw: random.Random) -> dict[str, list[Any]]:
    pieces = [word + " " for word in solution.split()[:-1]] + solution.split()[-1:]
    return {
        "row": list(range(len(rows))),
        "solution_tokens": [pieces for _ in rows],
        "solution_log_prob": [[-abs(draw.gauss(0, 2)) for _ in pieces] for _ in rows],
        "explanation_tokens": [row["tokens"] for row in rows],
        "explanation_kl": [[draw.gauss(0.2, 1) for _ in row["tokens"]] for row in rows],
    }


def metrics_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
