"""SIGINT and SIGTERM while a run trains: the step is finished and saved, and the same command continues after it."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from core.log import console
from tests.helpers.tiny_diffusion import make_diffusion_trainer
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_kill_and_resume import command, comparable, logged, run_to_the_end
from tests.test_masked_diffusion_trainer import SMALL_BATCH, counting_samples

NO_SAVES = ("max_steps=4", "save_steps=1000", "eval_strategy=no")


@pytest.fixture(scope="module", autouse=True)
def sigint_arrives():
    """Also where the tests were started with it ignored, as `nohup make test &` does; children inherit that."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


class SignalAt(TrainerCallback):
    """Signals this process at the beginning of a step, or when something else of it happens."""

    def __init__(self, step: int, number: int = signal.SIGINT, *, event: str = "on_step_begin", times: int = 1) -> None:
        def send(args, state, control, **_):
            if state.global_step == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)

        setattr(self, event, send)


def interrupted(trainer, at: SignalAt) -> str:
    handler = signal.getsignal(signal.SIGINT)
    trainer.callback_handler.callbacks.insert(0, at)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    return str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_step_at_work_is_finished_and_saved(number, model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES)
    message = interrupted(trainer, SignalAt(1, number))
    assert message == f"the same command continues from {tmp_path / 'run' / 'checkpoint-2'}"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_second_signal_stops_at_once(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES, "save_steps=1")
    assert "continues from" in interrupted(trainer, SignalAt(1, times=2))
    assert trainer.state.global_step == 1
    trainer = make_trainer(model, tmp_path / "other", *NO_SAVES)
    assert interrupted(trainer, SignalAt(1, times=2)) == "no checkpoint yet: the same command starts anew"


def test_a_terminal_that_hangs_up_twice_does_not_cost_the_step(model, tmp_path):
    """The kernel and the shell both tell."""
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES)
    assert "checkpoint-2" in interrupted(trainer, SignalAt(1, signal.SIGHUP, times=2))


def test_a_hang_up_under_nohup_changes_nothing(model, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(model, tmp_path / "run", *NO_SAVES)
        trainer.callback_handler.callbacks.insert(0, SignalAt(1, signal.SIGHUP))
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.global_step == 4


def test_a_pipe_that_breaks_saves_the_step_and_stops_like_a_hang_up(model, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES)
    for name in ("is_lost", "quiet"):
        monkeypatch.setattr(console, name, False)
    monkeypatch.setattr(console, "_file", BrokenPipe())
    assert "checkpoint-2" in interrupted(trainer, SignalAt(4))
    assert console.is_lost


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_a_signal_between_two_steps_does_not_cost_another(event, model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", "max_steps=4", "save_steps=2", "eval_steps=2")
    assert "checkpoint-2" in interrupted(trainer, SignalAt(2, event=event))


def test_after_the_last_step_there_is_nothing_to_continue(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES)
    trainer.callback_handler.callbacks.insert(0, SignalAt(3))
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_bad_step_is_not_saved_and_the_next_one_is_waited_for(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *NO_SAVES, "recover_from_nan=true")
    compute = trainer._compute_loss
    trainer._compute_loss = lambda *args: compute(*args) * (float("nan") if trainer.state.global_step == 1 else 1.0)
    assert "checkpoint-3" in interrupted(trainer, SignalAt(1))


def test_a_masked_diffusion_run_stops_in_the_same_way(tmp_path):
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *SMALL_BATCH, "save_steps=1000")
    assert "checkpoint-2" in interrupted(trainer, SignalAt(1))


@pytest.mark.slow
def test_the_same_command_continues_as_if_it_had_not_been_interrupted(model, tmp_path):
    rows = [{"question": f"{i}+{i}", "solution": f"={2 * i}"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = {
        folder: [*command(model, folder, "generator=transformers"), "save_steps=1000"] for folder in (whole, stopped)
    }
    run_to_the_end(words[whole])

    process = subprocess.Popen(words[stopped], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(process, stopped, 1)
    process.send_signal(signal.SIGINT)
    output = " ".join(process.communicate(timeout=600)[0].split())
    assert process.returncode == 130, output
    (checkpoint,) = stopped.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert step < 6 and "then saving; press again to stop now" in output and "the same command continues" in output
    assert not (stopped / "summary.json").exists() and not (stopped / "adapter_model.safetensors").exists()

    run_to_the_end(words[stopped])
    said = (stopped / "logs" / "training.log").read_text()
    assert said.count("\n--- ") == 1 and said.count("then saving") == 1  # the resumed run appends
    assert said.index("the same command continues") < said.index("continuing ") < said.index("after 6 steps")
    expected, resumed = comparable(whole, 0), comparable(stopped, 0)
    assert [line["step"] for line in resumed] == [line["step"] for line in expected]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def wait_for_step(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    deadline_s = time.monotonic() + 600
    while not any(line["step"] >= step and "loss" in line for line in logged(output_dir)):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
