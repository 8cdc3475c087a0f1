"""Memory while a run trains: the live line, the logged line, and the watch from another terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from core.log import CopyingConsole
from core.types import Phase
from runs.metrics import METRICS_FILE
from runs.run_folder import open_run_folder, write_summary
from tests.helpers.command import ROOT
from trainers import callbacks, watch
from trainers.callbacks import TEACHER_SHOWN, ConsoleProgress
from trainers.memory_line import MemoryLine

PEAKS = {Phase.LOAD: 0, Phase.GENERATE: int(47.1e9), Phase.SCORE: int(26e9), Phase.TRAIN: int(37.2e9)}


def memory_line(device: str) -> MemoryLine:
    return MemoryLine(device=torch.device(device), planned_bytes=int(48e9), peaks=lambda: PEAKS)


@pytest.fixture
def gpu_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(46.8e9), int(85e9)))


def test_the_live_line_has_what_is_in_use_and_the_peaks_beside_the_plan(gpu_in_use):
    expected = "GPU 38.2 of 85.0 GB in use; peaks: generate 47.1, score 26.0, train 37.2, planned 48.0"
    assert memory_line("cuda").live() == expected
    assert memory_line("cuda").short() == "GB generate 47.1 score 26.0 train 37.2"


def test_without_a_gpu_the_lines_say_so_and_show_the_process():
    resident_gb = psutil.Process().memory_info().rss / 1e9
    shown = re.match(r"no GPU; this process holds (\d+\.\d) GB", memory_line("cpu").live())
    assert shown and abs(float(shown[1]) - resident_gb) < 0.2
    assert re.fullmatch(r"RAM \d+\.\d GB", memory_line("cpu").short())


def test_a_training_shows_the_line_on_a_terminal_and_the_peaks_in_every_logged_line(
    gpu_in_use, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(callbacks.log, "propagate", True)
    caplog.set_level("INFO", logger="rlt")
    with open(tmp_path / "terminal", "w+") as terminal:
        monkeypatch.setattr(callbacks, "console", CopyingConsole(file=terminal, width=160, force_terminal=True))
        progress = ConsoleProgress(TEACHER_SHOWN, memory_line("cuda"))
        step = TrainingArguments(str(tmp_path)), TrainerState(global_step=1, max_steps=2), TrainerControl()
        progress.on_train_begin(*step)
        progress.on_log(*step, logs={"reward": -1.0})
        progress.on_train_end(*step)
        terminal.seek(0)
        assert "GPU 38.2 of 85.0 GB in use; peaks: generate 47.1" in terminal.read()
    assert "reward -1.00  GB generate 47.1 score 26.0 train 37.2" in caplog.text


def make_run(folder: Path) -> Path:
    values = {"max_steps": 60, "resume": "auto"}
    handle = open_run_folder(values, str(folder), "auto").lock
    memory = {"memory/train_reserved_gb": 37.2, "memory/train_predicted_gb": 37.7, "memory/score_rss_gb": 0}
    lines = [{"step": 12, "loss": 0.1, "reward": -3.14, **memory}, {"step": 12, "eval_reward": -3.0}]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "lo')
    handle.close()
    return folder


def nvidia_smi(folder: Path, monkeypatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65, 81059, 36430'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_watch_shows_gpu_state_step_and_peaks(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "results" / "mine")
    nvidia_smi(tmp_path, monkeypatch)
    assert watch.main([str(run), "--once"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA H100: 38.2 of 85.0 GB in use mine running, step 12/60, reward -3.14" in shown
    assert shown.endswith("peaks/planned GB: train 37.2/37.7")


def test_the_watch_finds_the_newest_run_and_says_how_it_ended(tmp_path, monkeypatch, capsys):
    for name in ("older", "newer"):
        make_run(tmp_path / "results" / name)
    os.utime(tmp_path / "results/older/config.yaml", (0, 0))
    for file in (tmp_path / "results/older").iterdir():
        os.utime(file, (0, 0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert watch.main(["--once"]) == 0
    assert re.search(r"no GPU: process \d+ holds \d+\.\d GB of RAM  newer running", capsys.readouterr().out)
    (tmp_path / "results/newer/.lock").write_text("999999999")
    assert "newer stopped" in watch.line(tmp_path / "results/newer")
    write_summary(tmp_path / "results/newer", {})
    (tmp_path / "results/newer/.lock").write_text(str(os.getpid()))  # a notebook outlives its run
    assert watch.main([]) == 0  # ends with the run
    assert "newer finished" in capsys.readouterr().out


def test_a_folder_without_a_run_is_one_message(tmp_path, capsys):
    assert watch.main([str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().out


def test_the_watch_answers_without_torch(tmp_path):
    run = make_run(tmp_path / "mine")
    code = f"import sys, trainers.watch as w; w.main([{str(run)!r}, '--once']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
