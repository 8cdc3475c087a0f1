"""A run of supervised fine-tuning that is small enough for a test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preflight.hardware import check_hardware_and_plan, load_for_this_machine
from runs.run_folder import open_run_folder
from schemas.compose import compose_run_config
from trainers.sft import SupervisedTrainer
from trainers.sft_run import build_supervised_trainer, prepare_rows

SMALL = (
    "train_batch_size=8",
    "per_device_train_batch_size=4",
    "num_eval_prompts=4",
    "max_steps=3",
    "save_steps=1",
    "eval_steps=3",
    "logging_steps=1",
)


def write_rows(file: Path, num_rows: int = 40, **more: str) -> Path:
    rows = [{"question": f"{i}+{i}", "solution": f"={2 * i}", "reasoning_trace": "ab" * (i % 5) + f"{i};"} | more
            for i in range(num_rows)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sft_values(run: str, model: Path | str, output_dir: Path, rows: Path, overrides: Sequence[str] = ()) -> Any:
    words = [f"model_name_or_path={model}", f"output_dir={output_dir}", f"dataset_id_or_path={rows}", *SMALL]
    return compose_run_config(run, [*words, *overrides])


def make_sft_trainer(run: str, model: Path | str, output_dir: Path, rows: Path, *overrides: str) -> SupervisedTrainer:
    """A trainer as `train.py` builds it."""
    values = sft_values(run, model, output_dir, rows, overrides)
    config: Any = load_for_this_machine(values)
    plan, device = check_hardware_and_plan(config)
    folder = open_run_folder(values, config.sft.output_dir, config.resume)
    return build_supervised_trainer(config, plan, device, *prepare_rows(config), folder)
