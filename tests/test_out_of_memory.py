"""Out of memory at chosen places of tiny runs: the same step is repeated with less at once, nothing else changes."""

import gc
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import rollout.logprobs
import trainers.teacher_grpo
from core.errors import StoppedError
from core.faults import is_out_of_memory, phase_of
from core.log import log
from core.types import Phase
from generation.base import RowsAtOnce, sample_in_calls
from generation.transformers_engine import TransformersGenerator
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from rollout.types import Completion
from schemas.compose import compose_run_config
from tests.helpers.tiny_diffusion import make_diffusion_trainer
from tests.helpers.tiny_run import SMALL, make_trainer, write_random_model
from tests.test_masked_diffusion_trainer import SMALL_BATCH, counting_samples
from trainers.start import train_runs

ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    "driver": RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "vllm": RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}
# float32 without dropout: micro-batches of other rows then give the same sums. 8 rows, 4 at once, all in one call.
RUN = (
    "max_steps=2",
    "save_strategy=no",
    "num_eval_prompts=0",
    "model_args.load_in_8bit=false",
    "model_args.torch_dtype=float32",
    "model_args.lora_r=4",
    "num_iterations=2",
    "importance_sampling_correction=true",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)


class Failing:
    """A function that raises an error of memory at the calls of these numbers, counted from 1."""

    def __init__(self, function: Callable[..., Any], calls: set[int], error: Exception = ERRORS["torch"]) -> None:
        self.function, self.calls, self.error, self.num_calls = function, calls, error, 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.num_calls += 1
        if self.num_calls in self.calls:
            raise type(self.error)(*self.error.args)
        return self.function(*args, **keywords)


def fail_in_scoring(trainer, monkeypatch, calls):
    monkeypatch.setattr(rollout.logprobs, "span_logprobs", Failing(rollout.logprobs.span_logprobs, calls))


def fail_in_forward(trainer, monkeypatch, calls):
    failing = Failing(trainers.teacher_grpo.span_logprobs, calls)
    monkeypatch.setattr(trainers.teacher_grpo, "span_logprobs", failing)


def fail_in_backward(trainer, monkeypatch, calls):
    """At the last of the gradients, when the others are there already."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(Failing(lambda gradient: gradient, calls))


def fail_in_generation(trainer, monkeypatch, calls):
    failing = Failing(TransformersGenerator._last_logits, calls)
    monkeypatch.setattr(TransformersGenerator, "_last_logits", lambda *args: failing(*args))


class Watched:
    """Losses, gradients and completions of every step of a trainer that is run."""

    def __init__(self, trainer) -> None:
        self.trainer, self.gradients = trainer, []
        clip = trainer._clip_grad_norm

        def keep(model):
            self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return clip(model)

        trainer._clip_grad_norm = keep
        trainer.train()
        self.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    def is_like(self, other: "Watched", *, num_faults: int = 1) -> None:
        assert self.losses == pytest.approx(other.losses, abs=1e-6 * num_faults)  # float32: each halving rounds anew
        for mine, theirs in zip(self.gradients, other.gradients, strict=True):
            assert mine.keys() == theirs.keys() and max(g.abs().max() for g in theirs.values()) > 1e-4
            for name, gradient in theirs.items():
                torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.fixture
def said():
    """What is logged while a test runs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    return Watched(make_trainer(model, tmp_path_factory.mktemp("whole") / "run", *RUN))


FAULTS = {
    "scoring": (fail_in_scoring, Phase.SCORE, {3}),
    "scoring twice": (fail_in_scoring, Phase.SCORE, {3, 5}),
    "forward": (fail_in_forward, Phase.TRAIN, {2}),
    "forward twice": (fail_in_forward, Phase.TRAIN, {2, 4}),
    "backward": (fail_in_backward, Phase.TRAIN, {2}),
    "backward twice": (fail_in_backward, Phase.TRAIN, {2, 4}),
    "generation": (fail_in_generation, Phase.GENERATE, {4}),
    "generation twice": (fail_in_generation, Phase.GENERATE, {4, 6}),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.slow if "twice" in name else ()) for name in FAULTS]
)
def test_a_step_is_the_one_without_the_fault(fault, model, undisturbed, tmp_path, monkeypatch, said):
    fail, phase, calls = FAULTS[fault]
    trainer = make_trainer(model, tmp_path / "run", *RUN)
    sampled = Failing(trainer.sampler, set())
    trainer.sampler = sampled
    fail(trainer, monkeypatch, calls)
    found = Watched(trainer)
    found.is_like(undisturbed, num_faults=len(calls))
    assert sampled.num_calls == 1  # one rollout for two steps
    lines = [line for line in said if "out of memory" in line]
    assert len(lines) == len(calls) and all(f"({phase})" in line and "\n" not in line for line in lines)
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert last[f"memory/{phase}_oom_retries"] == len(calls)


def run_of(model: Path, folder: Path, *words: str) -> Any:
    """Composed values of a tiny teacher's run as `train.py` hands them on."""
    named = [f"model_name_or_path={model}", f"student_model={model}", f"output_dir={folder}"]
    return compose_run_config("teacher_rlt_tiny", [*named, *SMALL, *RUN, *words])


@pytest.mark.parametrize("phase", [Phase.GENERATE, Phase.SCORE, Phase.TRAIN])
def test_memory_that_never_suffices_ends_the_run_with_one_message(phase, model, tmp_path, monkeypatch):
    """From the second step on, which has a checkpoint to go on from."""
    fail, first = {
        Phase.GENERATE: (fail_in_generation, 20),
        Phase.SCORE: (fail_in_scoring, 6),
        Phase.TRAIN: (fail_in_forward, 3),
    }[phase]
    fail(None, monkeypatch, set(range(first, 1000)))
    words = ("max_oom_retries=2", "save_strategy=steps", "save_steps=1", "max_steps=9", "num_iterations=1")
    with pytest.raises(StoppedError) as stopped:
        list(train_runs([run_of(model, tmp_path / "run", *words)]))
    message = str(stopped.value)
    checkpoint = max((tmp_path / "run").glob("checkpoint-*"))
    assert message.startswith(f"out of memory ({phase}), after 2 retries (max_oom_retries): CUDA out of memory. Tried")
    assert re.search(r"expected: \d+\.\d GB by the plan in this phase, \d\.\d GB measured", message)
    assert "remedy:" in message
    assert f"the same command continues from {checkpoint}; with other settings add resume={checkpoint}" in message
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (tmp_path / "run" / ".saving").exists()


def test_the_optimizers_step_is_not_repeated_since_it_may_be_half_done(model, tmp_path, monkeypatch):
    step = Failing(AcceleratedOptimizer.step, {2})
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda *args, **keywords: step(*args, **keywords))
    words = ("save_strategy=steps", "save_steps=1", "num_iterations=1", "optim=adamw_torch")
    with pytest.raises(StoppedError, match=r"out of memory \(train\)(.|\n)*continues from .*checkpoint-1"):
        list(train_runs([run_of(model, tmp_path / "run", *words)]))


def test_dropout_is_drawn_as_if_the_smaller_micro_batches_had_been_the_first(model, tmp_path, monkeypatch):
    words = (*RUN, "model_args.lora_dropout=0.3", "max_steps=3")
    failed = make_trainer(model, tmp_path / "failed", *words)
    with monkeypatch.context() as patch:
        fail_in_backward(failed, patch, {1})
        found = Watched(failed)
    smaller = make_trainer(model, tmp_path / "smaller", *words)
    smaller.retries.limits.update(failed.retries.limits)
    found.is_like(Watched(smaller))


def test_what_was_found_to_fit_is_remembered_by_a_resumed_run(model, tmp_path, monkeypatch):
    words = (*RUN, "save_strategy=steps", "save_steps=1")
    trainer = make_trainer(model, tmp_path / "run", *words)
    with monkeypatch.context() as patch:
        fail_in_forward(trainer, patch, {1})
        trainer.train()
    assert set(trainer.retries.limits) == {Phase.TRAIN}
    resumed = make_trainer(model, tmp_path / "resumed", *words)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.retries.limits == trainer.retries.limits


DIFFUSION = (*SMALL_BATCH, "eval_strategy=no", "save_strategy=no", "use_muon=false")


@pytest.fixture(scope="module")
def undisturbed_diffusion(tmp_path_factory):
    return Watched(make_diffusion_trainer(tmp_path_factory.mktemp("whole") / "run", counting_samples(), *DIFFUSION))


@pytest.mark.parametrize("calls", [{2}, {2, 3}, {3, 4}], ids=["once", "twice", "twice later"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_masked_diffusion_step_is_the_one_without_the_fault(where, calls, undisturbed_diffusion, tmp_path):
    """Two micro-batches a step: where the second fails, the gradients of the first are made anew."""
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *DIFFUSION)
    if where == "forward":
        trainer.compute_loss = Failing(trainer.compute_loss, calls)
    else:
        fail_in_backward(trainer, None, calls)
    Watched(trainer).is_like(undisturbed_diffusion)
    assert trainer.retries.num_retries == {Phase.TRAIN: len(calls)}


def test_a_masked_diffusion_evaluation_has_the_same_figures(tmp_path, monkeypatch):
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *SMALL_BATCH)
    expected = trainer.evaluate()
    forward = Failing(type(trainer.model).forward, {2, 6})
    monkeypatch.setattr(type(trainer.model), "forward", lambda *args, **keywords: forward(*args, **keywords))
    assert trainer.evaluate() == pytest.approx(expected, abs=1e-6)
    assert sum(trainer.retries.num_retries.values()) == 2


# The parts

CPU = torch.device("cpu")


def test_errors_of_memory_are_told_by_what_the_libraries_raise():
    assert all(is_out_of_memory(error) for error in ERRORS.values())
    others = [ValueError("out of range"), RuntimeError("CUDA error: an illegal memory access was encountered")]
    assert not any(is_out_of_memory(error) for error in others)
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = ERRORS["torch"]
    assert is_out_of_memory(wrapped)


def test_half_as_much_is_tried_at_once_and_from_then_on_and_no_less_than_what_cannot_be_divided():
    retries = MemoryRetries(PhaseMeter(CPU), max_retries=3)
    tried: list[int] = []

    def fits(at_most: int) -> Callable[[int], str]:
        def work(limit: int) -> str:
            tried.append(limit)
            if limit > at_most:
                raise MemoryError
            return "done"

        return work

    assert retries(Phase.TRAIN, 100, fits(30), smallest=30) == "done"
    assert retries(Phase.TRAIN, 100, fits(30), smallest=30) == "done"
    assert retries(Phase.TRAIN, 100, fits(60), smallest=60) == "done"  # a longer row goes alone
    assert retries(Phase.SCORE, 100, fits(100)) == "done"
    assert tried == [100, 50, 30, 30, 60, 100]
    with pytest.raises(MemoryError) as caught:
        retries(Phase.TRAIN, 100, fits(0), smallest=30)
    assert tried[6:] == [30, 30] and phase_of(caught.value).phase == Phase.TRAIN


def test_other_errors_and_a_run_without_retries_are_left_alone():
    retries = MemoryRetries(PhaseMeter(CPU), max_retries=0)
    for error in (MemoryError(), KeyError("a")):
        with pytest.raises(type(error)):
            retries(Phase.TRAIN, 8, Failing(lambda limit: limit, {1}, error))
    assert not retries.num_retries


def test_tensors_of_the_failed_attempt_are_gone_and_random_generators_are_set_back():
    retries = MemoryRetries(PhaseMeter(CPU), max_retries=1)
    first: list[Any] = []
    drawn: list[float] = []

    def work(limit: int) -> None:
        drawn.append(torch.rand(()).item())
        if not first:
            large = torch.zeros(1000, requires_grad=True)
            loop = SimpleNamespace(large=large * 2)
            loop.itself = loop
            first.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert first[0]() is None

    gc.disable()
    try:
        retries(Phase.TRAIN, 8, work)
    finally:
        gc.enable()
    assert drawn[0] == drawn[1] and len(drawn) == 2


@pytest.mark.parametrize("failed_calls", [{1}, {1, 2}, {2, 3}, {1, 2, 3}])
@pytest.mark.parametrize("num_generations", [1, 3, 4])
def test_rows_that_are_sampled_again_are_sampled_fewer_at_once_with_their_seeds(num_generations, failed_calls):
    prompts, seeds = [[p] for p in range(5)], list(range(5 * num_generations))
    sizes: list[int] = []

    def sample(rows: RowsAtOnce) -> list[Completion]:
        sizes.append(len(rows.seeds))
        owners = [prompt[0] for prompt in rows.prompts for _ in range(rows.num_generations)]
        return [
            Completion(token_ids=[owner, seed], logprobs=None, finish_reason="stop")
            for owner, seed in zip(owners, rows.seeds, strict=True)
        ]

    retries = MemoryRetries(PhaseMeter(CPU), max_retries=3)
    failing = Failing(sample, failed_calls)
    completions = sample_in_calls(failing, prompts, num_generations, seeds, rows_per_call=8, retries=retries)
    assert [c.token_ids for c in completions] == [[seed // num_generations, seed] for seed in seeds]
    assert sum(sizes) == len(seeds)  # what was done stays done
    num_failed = sum(call <= failing.num_calls for call in failed_calls)
    assert sizes[-1] <= max(1, min(8, len(seeds)) // 2**num_failed)
