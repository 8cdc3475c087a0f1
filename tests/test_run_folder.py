"""The run folder: an unfinished run is found again, nothing is lost, two runs never share it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers.trainer_utils import get_last_checkpoint

from core.errors import UserError
from planner.fit import resolve_auto
from preflight.hardware import check_hardware_and_plan
from runs.metrics import METRICS_FILE
from runs.run_folder import (
    SUMMARY_FILE,
    last_checkpoint,
    open_run_folder,
    write_evaluation,
    write_summary,
)
from runs.summary import memory_table, summarise, summary_table
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config, resolved_values
from tests.helpers.checkpoints import write_checkpoint
from trainers.build import check_before_loading

VALUES = {"learning_rate": 1e-3, "resume": "auto"}


def make_unfinished_run(path, *, steps=(2, 4), logged=6):
    folder = open_run_folder(VALUES, str(path), "auto")
    for step in steps:
        write_checkpoint(path, step)
    lines = [json.dumps({"step": step, "reward": -1.0}) for step in range(1, logged + 1)]
    (path / METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 7, "rew')
    folder.lock.close()


def test_an_unfinished_run_continues_from_its_last_checkpoint_and_drops_later_metrics(tmp_path):
    make_unfinished_run(tmp_path / "run")
    folder = open_run_folder({**VALUES, "gpu_gb": 80, "card_gb": 85}, str(tmp_path / "run"), "auto")
    assert folder.checkpoint == tmp_path / "run" / "checkpoint-4"
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_continued_run_keeps_the_tables_up_to_its_checkpoint_and_nothing_that_it_makes_again(tmp_path):
    make_unfinished_run(tmp_path / "run")
    for name in ("completions", "evaluations"):
        (tmp_path / "run" / name).mkdir(exist_ok=True)
    for step in (0, 4, 5):
        write_evaluation(tmp_path / "run", step, {"step": [step]})
        (tmp_path / "run" / "completions" / f"completions_{step:05d}.parquet").write_text("")
    (tmp_path / "run" / "completions" / "mine_00009.parquet").write_text("")
    open_run_folder(VALUES, str(tmp_path / "run"), "auto")
    assert files_in(tmp_path / "run" / "evaluations") == ["evaluation_00000.parquet", "evaluation_00004.parquet"]
    kept = ["completions_00000.parquet", "completions_00004.parquet", "mine_00009.parquet"]
    assert files_in(tmp_path / "run" / "completions") == kept


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_an_unfinished_run_without_a_checkpoint_starts_again(tmp_path):
    make_unfinished_run(tmp_path / "run", steps=())
    folder = open_run_folder(VALUES, str(tmp_path / "run"), "auto")
    assert folder.checkpoint is None
    assert folder.metrics_file.read_text() == ""


@pytest.mark.parametrize(
    ("values", "resume", "finish"),
    [({**VALUES, "learning_rate": 1.0}, "auto", False), (VALUES, "never", False), (VALUES, "auto", True)],
    ids=["other settings", "resume=never", "finished run"],
)
def test_any_other_content_is_kept_aside(tmp_path, values, resume, finish):
    make_unfinished_run(tmp_path / "run")
    if finish:
        write_summary(tmp_path / "run", {"steps": 6})
    folder = open_run_folder(values, str(tmp_path / "run"), resume)
    assert folder.checkpoint is None
    assert not folder.metrics_file.exists()
    assert (tmp_path / "run.1" / "checkpoint-4" / "trainer_state.json").exists()


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    first = open_run_folder(VALUES, str(tmp_path / "run"), "auto")
    with pytest.raises(UserError, match="another process"):
        open_run_folder(VALUES, str(tmp_path / "run"), "auto")
    first.lock.close()
    open_run_folder(VALUES, str(tmp_path / "run"), "auto")


def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no config.yaml of a run"):
        open_run_folder(VALUES, str(tmp_path / "mine"), "auto")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["my.jsonl"]
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/not-here"])
def test_a_folder_that_cannot_be_made_is_one_message(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"`output_dir` '{name}'"):
        open_run_folder(VALUES, name, "auto")


def test_the_resolved_configuration_holds_defaults_and_keeps_auto():
    composed = compose_run_config("teacher_rlt_tiny", ["per_device_train_batch_size=auto", "model_args.lora_r=4"])
    values = resolved_values(load_run_config(resolve_auto(composed, None)), composed)
    assert composed.items() <= {**values, "model_args": composed["model_args"]}.items()
    assert values["per_device_train_batch_size"] == "auto" and values["generator"] == "auto"
    assert values["model_args"]["lora_r"] == 4 and values["model_args"]["llm_int8_threshold"] == 6.0
    assert "beta" in values and "gradient_accumulation_steps" not in values
    assert yaml.safe_load(yaml.safe_dump(values)) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model_args.adapter_path=/no/such"], "holds no adapter"),
        (["generator=vllm", "generator_weights=nf4"], "generator"),
        (["unbias_teacher_log_probs=false", "temperature=0.7"], "unbias_teacher_log_probs"),
    ],
)
def test_a_run_that_cannot_work_leaves_an_unfinished_run_in_its_folder_alone(words, message, tmp_path):
    make_unfinished_run(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    values = compose_run_config("teacher_rlt_tiny", [f"output_dir={tmp_path / 'run'}", "generator=auto", *words])
    config = load_run_config(values)
    with pytest.raises(UserError, match=message):
        check_before_loading(config, values, *check_hardware_and_plan(config))
    assert (tmp_path / "run" / "config.yaml").read_text() == before and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("folders", [(), ("checkpoint-0",), ("checkpoint-9", "checkpoint-10"), ("checkpoint-x", "x")])
def test_the_last_checkpoint_is_the_one_that_transformers_would_take_but_for_that_of_step_0(folders, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-12.partial").mkdir()
    theirs = get_last_checkpoint(str(tmp_path))
    expected = None if theirs is None or theirs.endswith("checkpoint-0") else tmp_path / Path(theirs).name
    assert last_checkpoint(tmp_path) == expected


def test_a_run_is_read_back_without_torch():
    code = "import sys, runs.model_card, runs.run_folder, runs.summary, runs.usage; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=CONFIG_ROOT.parent, capture_output=True, text=True)
    assert "runs.metrics" in loaded.stdout.split()
    assert not {"torch", "transformers", "trl"} & set(loaded.stdout.split())


def test_a_half_written_checkpoint_is_never_seen(tmp_path):
    make_unfinished_run(tmp_path / "run")
    staged = tmp_path / "run" / ".saving" / "checkpoint-6"
    staged.mkdir(parents=True)
    (staged / "trainer_state.json").write_text("{}")
    folder = open_run_folder(VALUES, str(tmp_path / "run"), "auto")
    assert folder.checkpoint.name == "checkpoint-4"
    assert not staged.exists()


def test_the_summary_compares_first_and_last_steps_and_evaluations(tmp_path):
    lines = [{"step": 0, "eval_reward": -5.0, "eval_solution_log_prob": -2.0, "eval_share/leak": 0.5}]
    lines += [{"step": s, "reward": -float(20 - s), "sampling/logp_difference": 0.01} for s in range(1, 21)]
    lines += [{"step": 20, "eval_reward": -1.0, "eval_solution_log_prob": -0.5, "eval_share/honest": 1.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    memory = {"measured": "RSS", "phases": {"train": {"predicted_gb": 1.0, "measured_gb": 2.0}}}
    summary = summarise(tmp_path, memory)
    assert summary["reward"] == {"before": -17.0, "after": -2.0}
    assert summary["eval_solution_log_prob"] == {"before": -2.0, "after": -0.5}
    assert summary["eval_share/leak"] == {"before": 0.5, "after": 0.0}
    assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == summary
    assert summary_table(summary).row_count == 5
    assert memory_table(summary).row_count == 1
    summary["memory"]["phases"]["train"]["driver_gb"] = 2.75  # on a GPU
    assert list(memory_table(summary).columns[-1].cells) == ["2.75"]


def test_a_summary_passes_over_steps_in_which_a_figure_is_null(tmp_path):
    lines = [{"step": 1, "reward": -3.0, "sampling/logp_difference": None}, {"step": 2, "reward": -1.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(tmp_path, {"measured": "RSS", "phases": {}})
    assert summary["logp_difference"] is None and summary["reward"] == {"before": -3.0, "after": -1.0}
    assert summary_table(summary).row_count == 1
