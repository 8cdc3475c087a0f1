"""Non-finite values at chosen steps of a tiny run: it goes on, lowers the rate, rolls back, or stops; and says so."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from core.errors import NonFiniteError, UserError
from runs.checkpoints import publish_checkpoint
from runs.run_folder import last_checkpoint
from tests.helpers.checkpoints import truncate
from tests.helpers.tiny_diffusion import make_diffusion_trainer
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_masked_diffusion_trainer import SMALL_BATCH, counting_samples
from trainers.recovery import last_good_checkpoint

RATE = 2e-3
RUN = ("max_steps=7", "save_steps=2", "eval_strategy=no", f"learning_rate={RATE}", "recover_from_nan=true")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


class Injected:
    """A run in which the named quantity is NaN at the named steps, once each (`again`: every time)."""

    def __init__(self, model: Path, folder: Path, what: str, steps: set[int], *words: str, again: bool = False) -> None:
        self.left, self.again = set(steps), again
        self.trainer = make_trainer(model, folder / "run", *RUN, *words)
        self.updates: dict[int, bool] = {}
        getattr(self, f"_inject_{what}")()
        self._watch_updates()

    def _is_due(self) -> bool:
        step = self.trainer.state.global_step + 1
        if step not in self.left:
            return False
        self.left -= set() if self.again else {step}
        return True

    def _inject_loss(self) -> None:
        compute = self.trainer._compute_loss
        self.trainer._compute_loss = lambda *args: compute(*args) * (math.nan if self._is_due() else 1.0)

    def _inject_gradient(self) -> None:
        clip = self.trainer._clip_grad_norm

        def poisoned(model):
            if self._is_due():
                next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = math.inf
            return clip(model)

        self.trainer._clip_grad_norm = poisoned

    def _inject_reward(self) -> None:
        score = self.trainer.scorer._score

        def poisoned(role, rows, temperature):
            scored = score(role, rows, temperature)
            return [tuple(span * math.nan for span in row) for row in scored] if self._is_due() else scored

        self.trainer.scorer._score = poisoned

    def _watch_updates(self) -> None:
        """Whether the adapter moved in each step that ended."""
        end_of_step = self.trainer.callback_handler.on_step_end
        parameters = [p for p in self.trainer.host.teacher.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]

        def watched(args, state, control):
            self.updates[state.global_step] = any(
                not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)
            )
            before[:] = [p.detach().clone() for p in parameters]
            return end_of_step(args, state, control)

        self.trainer.callback_handler.on_step_end = watched

    @property
    def lines(self) -> list[dict]:
        text = Path(self.trainer.args.output_dir, "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def story(self) -> list[tuple[int, str]]:
        return [(line["step"], line["recovery/action"]) for line in self.lines if "recovery/action" in line]

    def finish(self) -> "Injected":
        self.trainer.train()
        self.trainer.finish()
        adapter = load_file(Path(self.trainer.args.output_dir, "adapter_model.safetensors"))
        assert all(tensor.isfinite().all() for tensor in adapter.values())
        assert self.trainer.state.global_step == 7
        return self


@pytest.mark.parametrize(
    "what",
    ["loss", pytest.param("gradient", marks=pytest.mark.slow), pytest.param("reward", marks=pytest.mark.slow)],
)
def test_one_bad_step_is_skipped_and_the_run_goes_on_as_before(what, model, tmp_path):
    run = Injected(model, tmp_path, what, {3}).finish()
    assert run.story == [(3, "skip")]
    assert [step for step, moved in run.updates.items() if not moved] == [3]
    assert [line["learning_rate"] for line in run.lines if "loss" in line] == pytest.approx([RATE] * 7)
    causes = {"loss": "the loss is nan", "gradient": "the gradient norm is", "reward": "log-probs of row 0: nan"}
    assert causes[what] in next(line for line in run.lines if "recovery/cause" in line)["recovery/cause"]


def test_a_skipped_step_leaves_the_optimizer_state_alone(model, tmp_path):
    run = Injected(model, tmp_path, "gradient", {3})
    states = []
    optimizer_step = run.trainer.callback_handler.on_optimizer_step

    def watched(args, state, control):
        optimizer = run.trainer.optimizer
        states.append([v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)])
        return optimizer_step(args, state, control)

    run.trainer.callback_handler.on_optimizer_step = watched
    run.finish()
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))


def test_two_bad_steps_lower_the_rate(model, tmp_path):
    run = Injected(model, tmp_path, "loss", {3, 4}).finish()
    assert run.story == [(3, "skip"), (4, "lower rate")]
    rates = {line["step"]: line["learning_rate"] for line in run.lines if "loss" in line}
    assert rates[2] == pytest.approx(RATE) and rates[5] == rates[7] == pytest.approx(RATE / 2)


def test_a_third_rolls_back_to_the_last_good_checkpoint_and_the_run_finishes(model, tmp_path):
    run = Injected(model, tmp_path, "loss", {3, 4, 5, 6}, "sync_ref_model=true", "ref_model_sync_steps=2")
    begins, steps_seen = run.trainer.callback_handler.on_train_begin, []

    def watched(args, state, control):
        steps_seen.append(state.global_step)
        if state.global_step == 2:
            saved = load_file(Path(args.output_dir, "checkpoint-2", "adapter_model.safetensors"))
            for name, parameter in run.trainer.host.teacher.named_parameters():
                if ".default." in name:
                    assert torch.equal(parameter, saved[name.replace(".default", "")])
            assert run.trainer.sampler.synced_version is None
        return begins(args, state, control)

    run.trainer.callback_handler.on_train_begin = watched
    run.finish()
    assert steps_seen == [0, 2]
    assert run.story == [(3, "skip"), (4, "lower rate"), (5, "roll back"), (6, "skip")]
    trained = [line for line in run.lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert trained[-1]["learning_rate"] == pytest.approx(RATE / 4)


def test_a_masked_diffusion_model_whose_weights_are_all_trained_rolls_back_too(tmp_path):
    words = ("recover_from_nan=true", "max_steps=5", "save_steps=1", "eval_strategy=no", *SMALL_BATCH[:3])
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *words)
    compute, left = trainer.compute_loss, {2, 3, 4}

    def poisoned(*args, **kwargs):
        loss = compute(*args, **kwargs)
        if trainer._micro_batch == (step := trainer.state.global_step, 1) and step in left:
            left.remove(step)
            return loss * math.nan
        return loss

    trainer.compute_loss = poisoned
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["recovery/action"] for line in lines if "recovery/action" in line] == [
        "skip",
        "lower rate",
        "roll back",
    ]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 3, 4, 5]
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize("what", ["adapter", "optimizer"])
def test_weights_or_optimizer_state_that_are_not_finite_are_rolled_back_at_once(what, model, tmp_path):
    """Spoilt after step 3: the canary would stop a run that went on sampling from such an adapter."""
    run = Injected(model, tmp_path, "loss", set())
    run.trainer.callback_handler.callbacks.insert(0, Spoil(what, step=3))
    run.finish()
    assert run.story == [(3 if what == "adapter" else 4, "roll back")]
    assert "weights are not finite" in next(line for line in run.lines if "recovery/cause" in line)["recovery/cause"]
    steps = [line["step"] for line in run.lines if "loss" in line]
    assert steps == ([1, 2, 3, 4, 5, 6, 7] if what == "adapter" else [1, 2, 3, 3, 4, 5, 6, 7])
    state = [v for s in run.trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(value.isfinite().all() for value in state if value.is_floating_point())


class Spoil(TrainerCallback):
    """Makes a value of the adapter or of the optimizer's state NaN at the end of a step, once."""

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_step_end(self, args, state, control, model, optimizer, **_):
        if state.global_step == self.step:
            self.step = -1
            parameter = next(p for p in model.parameters() if p.requires_grad)
            state_of = optimizer.state[parameter]
            values = [v for v in state_of.values() if torch.is_tensor(v) and v.shape == parameter.shape]
            spoilt = parameter.data if self.what == "adapter" else values[0]
            spoilt.view(-1)[0] = math.nan


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_samples_from_the_adapter_that_was_restored(model, tmp_path):
    """The canary compares generator and trainer at every step; a generator that was left behind would stop the run."""
    words = ("generator=vllm", "learning_rate=2e-2", "canary_tolerance=0.15")
    run = Injected(model, tmp_path, "loss", {3, 4, 5}, *words).finish()
    assert run.story[-1] == (5, "roll back")
    run.trainer.close()


@pytest.mark.slow
def test_bad_steps_before_the_first_checkpoint_go_back_to_the_start(model, tmp_path):
    run = Injected(model, tmp_path, "reward", {1, 2, 3}, "save_steps=100").finish()
    assert run.story[-1] == (3, "roll back")
    assert [line["step"] for line in run.lines if "loss" in line][:4] == [1, 2, 1, 2]


@pytest.mark.slow
def test_what_never_becomes_finite_ends_the_run_with_its_cause(model, tmp_path):
    run = Injected(model, tmp_path, "loss", set(range(3, 8)), "max_recoveries=3", again=True)
    with pytest.raises(NonFiniteError, match="the loss is nan; 3 bad steps were forgiven"):
        run.trainer.train()
    assert run.story == [(3, "skip"), (4, "lower rate"), (5, "roll back"), (3, "stop")]
    assert last_good_checkpoint(Path(run.trainer.args.output_dir)).name == "checkpoint-2"


def test_runs_that_cannot_recover_are_refused(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *RUN[:-1])
    for wrong in ({"learning_rate": 0.0}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"world_size": 2}):
        plain = {"learning_rate": RATE, "lr_scheduler_type": "constant", "world_size": 1, "output_dir": "unused"}
        trainer.args = SimpleNamespace(**plain | wrong)
        with pytest.raises(UserError, match="recover_from_nan=true"):
            trainer.start_recovery(max_recoveries=1, lr_backoff=0.5)


def test_a_run_killed_before_its_first_save_starts_anew(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", *RUN)
    trainer.add_callback(StopAfter(steps=1))
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-0"]
    assert last_checkpoint(folder) is None
    publish_checkpoint(folder / "checkpoint-0", folder / "checkpoint-2")
    assert last_checkpoint(folder) == folder / "checkpoint-2"


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.steps


def test_without_the_knob_a_bad_reward_stops_the_run(model, tmp_path):
    run = Injected(model, tmp_path, "reward", {3}, "recover_from_nan=false")
    with pytest.raises(NonFiniteError, match="log-probs of row 0"):
        run.trainer.train()


def test_a_checkpoint_that_is_damaged_or_has_a_broken_adapter_is_passed_over(tmp_path):
    for step, value in ((2, 1.0), (10, 1.0), (12, math.nan), (14, 1.0)):
        (tmp_path / "staged").mkdir()
        adapter = {"a": torch.ones(3), "b": torch.tensor([0.0, value])}
        save_file(adapter, tmp_path / "staged" / "adapter_model.safetensors")
        publish_checkpoint(tmp_path / "staged", tmp_path / f"checkpoint-{step}")
    truncate(tmp_path / "checkpoint-14" / "adapter_model.safetensors")
    (tmp_path / "checkpoint-16.bak").mkdir()
    assert last_good_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_checkpoint_with_a_broken_optimizer_state_is_passed_over(tmp_path):
    for step, value in ((2, 1.0), (4, math.nan)):
        (tmp_path / "staged").mkdir()
        save_file({"a": torch.ones(3)}, tmp_path / "staged" / "adapter_model.safetensors")
        moments = {"step": torch.tensor(2.0), "exp_avg": torch.tensor([0.0, value])}
        torch.save({"state": {0: moments}, "param_groups": []}, tmp_path / "staged" / "optimizer.pt")
        publish_checkpoint(tmp_path / "staged", tmp_path / f"checkpoint-{step}")
    assert last_good_checkpoint(tmp_path).name == "checkpoint-2"


def test_no_checkpoint_to_go_back_to_is_said(tmp_path):
    with pytest.raises(NonFiniteError, match="no checkpoint in"):
        last_good_checkpoint(tmp_path)
