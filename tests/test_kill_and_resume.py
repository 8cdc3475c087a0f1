"""`kill -9`, then the same command: the steps that follow equal those of a run that was never interrupted."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from schemas.compose import CONFIG_ROOT
from tests.helpers.tiny_run import SMALL, write_random_model

pytestmark = pytest.mark.slow

_STEPS, _SAVE_STEPS, _KILL_AFTER = 6, 2, 3
_NOT_COMPARED = ("time/", "memory/", "tokens_per_s/", "step_time", "train_runtime", "train_samples", "train_steps")


def command(model: Path, output_dir: Path, engine: str) -> list[str]:
    words = [
        f"model_name_or_path={model}",
        f"student_model={model}",
        f"output_dir={output_dir}",
        *SMALL,
        *engine.split(),
        f"max_steps={_STEPS}",
        f"save_steps={_SAVE_STEPS}",
        "eval_steps=3",
        "sync_ref_model=true",
        "ref_model_sync_steps=3",
        # Two prompts per step out of 8: four steps per epoch, so the resumed run starts in the middle of the first.
        f"dataset_id_or_path={output_dir.parent / 'rows.jsonl'}",
    ]
    return [sys.executable, str(CONFIG_ROOT.parent / "train.py"), "--config-name=teacher_rlt_tiny", *words]


def logged(output_dir: Path) -> list[dict]:
    file = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def comparable(output_dir: Path, after_step: int) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(_NOT_COMPARED)}
        for line in logged(output_dir)
        if line["step"] > after_step and "train_loss" not in line
    ]


def run_to_the_end(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def kill_after(words: list[str], output_dir: Path, step: int) -> None:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 600
    while not any(line["step"] >= step and "loss" in line for line in logged(output_dir)):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("engine", ["generator=transformers", "generator=vllm", "generator=vllm generator_base=shared"])
def test_a_killed_run_continues_as_if_it_had_not_been(engine, tmp_path):
    if "vllm" in engine and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    model = write_random_model(tmp_path / "model")
    rows = [{"question": f"{i}+{i}", "solution": f"={2 * i}"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(command(model, whole, engine))
    kill_after(command(model, killed, engine), killed, _KILL_AFTER)
    assert not (killed / "summary.json").exists()
    run_to_the_end(command(model, killed, engine))

    expected, resumed = comparable(whole, _SAVE_STEPS), comparable(killed, _SAVE_STEPS)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    for step in range(_KILL_AFTER + 1, _STEPS + 1):
        name = f"completions/completions_{step:05d}.parquet"
        columns = ["prompt", "completion"]
        assert pd.read_parquet(killed / name)[columns].equals(pd.read_parquet(whole / name)[columns])
    for folder in ("completions", "evaluations"):
        names = sorted(file.name for file in (whole / folder).iterdir())
        assert names == sorted(file.name for file in (killed / folder).iterdir())
    for step in (0, 3, 6):
        tables = [pd.read_parquet(run / f"evaluations/evaluation_{step:05d}.parquet") for run in (whole, killed)]
        assert len(tables[0]) and tables[0]["completion"].equals(tables[1]["completion"])
