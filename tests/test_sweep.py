"""A sweep's jobs in processes of their own: one at a time, the worst status, and Ctrl-C."""

import os
import pty
import signal
import sys
import threading
import time

import pytest
import torch

import train
from core.log import log
from schemas.compose import CONFIG_ROOT, JOB_OF_A_SWEEP, compose_run_config, with_sweep_folders
from schemas.run import ConfigError
from tests.helpers.tiny_run import SMALL, write_random_model
from trainers import start, sweep
from trainers.sweep import run_jobs
from trainers.teacher_grpo import TeacherGRPOTrainer

ROOT = CONFIG_ROOT.parent

# A job that leaves its seed in order.txt and ends with it as its status.
ENDS_WITH_ITS_SEED = """
import json, sys
seed = json.load(sys.stdin)["seed"]
with open("order.txt", "a") as file:
    print(seed, file=file)
sys.exit(seed)
"""
# A job that trains until it is interrupted: it counts the signals that come within half a second.
COUNTS_SIGNALS = """
import json, signal, sys, time
json.load(sys.stdin)
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(number))
open("started.txt", "w").close()
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
with open("signals.txt", "w") as file:
    print(*seen, file=file)
sys.exit(130)
"""


def jobs(*seeds, words=()):
    runs = [compose_run_config("teacher_rlt_tiny", [f"seed={seed}", *words]) for seed in seeds]
    return with_sweep_folders(runs)


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run under nohup
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("statuses", "worst"), [((0, 0), 0), ((0, 2, 0), 2), ((1, 2, 0), 1), ((0, 7), 1)])
def test_every_job_runs_in_order_and_the_worst_status_counts(statuses, worst, tmp_path):
    assert run_jobs([sys.executable, "-c", ENDS_WITH_ITS_SEED], jobs(*statuses)) == worst
    assert (tmp_path / "order.txt").read_text().split() == [str(status) for status in statuses]


def test_a_job_that_is_killed_has_failed(tmp_path):
    assert run_jobs(["sh", "-c", "kill -9 $$"], jobs(1, 2)) == 1


def test_an_invalid_job_keeps_the_others_from_starting(tmp_path):
    first, second = jobs(0, 1)
    with pytest.raises(ConfigError, match="train_batch_size"):
        run_jobs([sys.executable, "-c", ENDS_WITH_ITS_SEED], [first, second | {"train_batch_size": 7}])
    assert not (tmp_path / "order.txt").exists()


def wait_for(path):
    deadline_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_job_at_work_and_ends_the_sweep(number, tmp_path, monkeypatch, caplog):
    def interrupt():
        wait_for(tmp_path / "started.txt")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(log, "propagate", True)
    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_jobs([sys.executable, "-c", COUNTS_SIGNALS], jobs(1, 2, 3)) == 130
    thread.join()
    assert (tmp_path / "signals.txt").read_text().split() == [str(int(number))]
    assert "2 of 3 jobs were not started" in caplog.text
    assert signal.getsignal(number) is before


def test_ctrl_c_on_a_terminal_reaches_the_job_once(tmp_path):
    """A second signal would stop it at once instead of saving the step at work."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from trainers.sweep import run_jobs; "
        f"sys.exit(run_jobs([sys.executable, '-c', {COUNTS_SIGNALS!r}], {jobs(1, 2)!r}))"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    wait_for(tmp_path / "started.txt")
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert (tmp_path / "signals.txt").read_text().split() == [str(int(signal.SIGINT))]


def test_on_a_gpu_a_sweep_is_processes_and_a_single_run_is_not(monkeypatch):
    started = []

    def run(command, jobs):
        started.append((command, jobs))
        return 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep, "run_jobs", run)
    monkeypatch.setattr(start, "load_for_this_machine", lambda values: sys.exit("in this process"))
    runs = [compose_run_config("teacher_rlt_tiny", [f"seed={seed}"]) for seed in (1, 2)]
    assert train._train_all(runs) == 1
    assert started == [([sys.executable, str(ROOT / "train.py"), JOB_OF_A_SWEEP], with_sweep_folders(runs))]
    with pytest.raises(SystemExit, match="in this process"):
        train._train_all(runs[:1])


def test_results_are_written_before_the_generator_is_closed(tmp_path, monkeypatch):
    """What an engine does as it ends must not cost the run its summary."""

    def close(self):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(TeacherGRPOTrainer, "close", close)
    model = write_random_model(tmp_path / "model")
    words = [f"model_name_or_path={model}", f"student_model={model}", *SMALL, "max_steps=1", "eval_strategy=no"]
    with pytest.raises(RuntimeError, match="invalid argument"):
        train._train_all([compose_run_config("teacher_rlt_tiny", [*words, "output_dir=run"])])
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_jobs_of_train_py_say_and_leave_what_single_runs_do(tmp_path, capfd):
    model = write_random_model(tmp_path / "model")
    words = [f"model_name_or_path={model}", f"student_model={model}", *SMALL, "max_steps=1", "eval_strategy=no"]
    refused, trained = jobs(1, 2, words=words)
    refused["model_name_or_path"] = "./nowhere"
    assert run_jobs([sys.executable, str(ROOT / "train.py"), JOB_OF_A_SWEEP], [refused, trained]) == 2
    said = capfd.readouterr().out
    assert "this run cannot start" in said and "./nowhere" in said and "after 1 steps" in said
    assert (tmp_path / trained["output_dir"] / "summary.json").exists()
    assert not (tmp_path / refused["output_dir"]).exists()
