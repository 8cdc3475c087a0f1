"""Batch size from the memory plan, compiled forwards, checks of optimizers, prefetching, recovery from NaN."""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import nn

from core.errors import UserError
from core.packages import is_installed
from core.units import format_gb
from optimization.catalogue import TEACHER_RUN, run_for_model
from optimization.gpu import NO_CARD, Card, find_card
from optimization.record import AppliedOptimization, Change, ChosenSettings, Obstacle, announce, nothing
from planner.fit import largest_micro_batch
from planner.plan import plan_run
from schemas.any_run import TrainingRunConfig
from schemas.compose import compose_run_config
from schemas.methods import as_training, method_of
from schemas.run import AnyRunConfig, load_run_config

DEFAULT_RUN = TEACHER_RUN
ModelT = TypeVar("ModelT", bound=nn.Module)

_LIBRARY_OF_OPTIMIZER = {
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchChoice:
    """A micro-batch that fits, and the accumulation that keeps the rows of an optimizer step.

    Unpacks into these two: `batch_size, grad_accum = choice`.
    """

    batch_size: int
    """Rows (completions of a teacher) of one forward and backward (`per_device_train_batch_size`)."""
    gradient_accumulation_steps: int
    peak_bytes: int
    """Of the phase that needs most, predicted."""
    card_bytes: int
    reason: str
    """What was planned, for which GPU."""

    def __iter__(self) -> Iterator[int]:
        return iter((self.batch_size, self.gradient_accumulation_steps))


def choose_batch_size(config: AnyRunConfig, card_bytes: int, where: str) -> BatchChoice:
    """The largest micro-batch of `config` that the planner fits into a GPU; prompt groups and the step stay whole.

    Raises:
        UserError: not even one row at a time fits, or nothing is trained.
    """
    training = training_of(config)
    plan = plan_run(config, card_bytes)
    micro_batch = largest_micro_batch(plan.settings, card_bytes)
    if micro_batch is None:
        raise UserError(
            f"{plan.settings.teacher.name} on {where} ({format_gb(card_bytes)}): {format_gb(plan.max_bytes)} planned",
            expected="a run of which at least one row at a time fits",
            remedy="python test_config_85gb.py shows which settings would make it fit; or choose a smaller size",
        )
    rows = f"{training.train_batch_size} {method_of(config).rows}"
    fitted = plan_run(_with_micro_batch(training, micro_batch), card_bytes)
    return BatchChoice(
        batch_size=micro_batch,
        gradient_accumulation_steps=training.train_batch_size // micro_batch,
        peak_bytes=fitted.max_bytes,
        card_bytes=card_bytes,
        reason=f"{plan.settings.teacher.name}, {rows} per step, on {where}",
    )


def training_of(config: AnyRunConfig) -> TrainingRunConfig:
    """
    Raises:
        UserError: it is a configuration that trains nothing, so that there is no micro-batch to choose.
    """
    if (training := as_training(config)) is None:
        raise UserError(
            f"{config.run_name} is {method_of(config).title}, which trains nothing",
            expected="a run configuration with a micro-batch",
            remedy="leave --auto-batch and --all out; the plan says what is sampled and scored at once",
        )
    return training


def _with_micro_batch(config: TrainingRunConfig, micro_batch: int) -> TrainingRunConfig:
    arguments = config.arguments.model_copy(update={"per_device_train_batch_size": micro_batch})
    return replace(config, **{method_of(config).arguments_field: arguments})


def planned_card(config: AnyRunConfig, card: Card | None) -> tuple[int, str]:
    """Bytes and description of the GPU to plan for: `gpu_gb`, the one that is here, or the configuration's own."""
    if config.gpu_gb is not None:
        return int(config.gpu_gb * 1e9), f"the GPU of gpu_gb={config.gpu_gb:g}"
    if card is not None:
        return card.total_bytes, str(card)
    return int(config.card_gb * 1e9), f"a GPU of {config.card_gb:g} GB, which {config.run_name} is for ({NO_CARD})"


def get_optimal_batch_size_for_gpu(
    model_type: str = "qwen2.5", size: str = "7b", *, gpu_gb: float | None = None, run: str | None = None
) -> BatchChoice:
    """Micro-batch and accumulation for a model by family and size with the batch and lengths of the run `run`.

        batch_size, grad_accum = get_optimal_batch_size_for_gpu(model_type="llada", size="medium")

    `run: None` is the run configuration that the model is trained with (`optimization.catalogue`).

    `gpu_gb: None` plans for the GPU that is here, without one for the GPU of the run.

    Raises:
        UserError: family or size is not known (the known ones are listed), or it does not fit.
    """
    own_run, words = run_for_model(model_type, size)
    words = words + ([f"gpu_gb={gpu_gb}"] if gpu_gb is not None else [])
    config = load_run_config(compose_run_config(run or own_run, words))
    return choose_batch_size(config, *planned_card(config, find_card()))


def compile_obstacle(*, has_own_model: bool, on_gpu: bool, finds_outliers: bool) -> str | None:
    """Why a forward is not compiled; None if it can be.

    `finds_outliers`: its linears are LLM.int8 with a threshold. They pick outlier columns in the forward, and at a
    number that only the data know torch.compile ends its graph.
    """
    if not has_own_model:
        return "this role is played by the teacher's own base, whose adapter is switched"
    if finds_outliers:
        return (
            "every LLM.int8 linear ends the graph (it looks for outlier columns), so nothing is gained; "
            "model_args.int8_matmul=dequantize can be compiled"
        )
    return None if on_gpu else "the model is on a CPU, where compiling takes longer than it gives back"


def enable_torch_compile(model: ModelT, *, backend: str = "inductor") -> ModelT:
    """Compile the forward of a model's body in place; returns the model: `model = enable_torch_compile(model)`.

    What was done, or why nothing was (a CPU), is logged; `compile_forward` returns that record, whose `undo()`
    makes the forward eager again.
    """
    announce(compile_forward(model, backend=backend))
    return model


def compile_forward(model: nn.Module | None, *, backend: str = "inductor") -> AppliedOptimization | Obstacle:
    """Compile the forward of a frozen model's body in place, for any length (`dynamic`).

    Not for a model with an adapter that is trained or switched: each switch would compile anew. On a CPU nothing is
    done with the default backend: the runs there are over before it has compiled.
    """
    on_gpu = model is not None and next(model.parameters()).device.type == "cuda"
    obstacle = compile_obstacle(
        has_own_model=model is not None,
        on_gpu=on_gpu or backend != "inductor",
        finds_outliers=model is not None and any(map(_finds_outliers, model.modules())),
    )
    if obstacle is None and model is not None and any(module._forward_pre_hooks for module in model.modules()):
        obstacle = "its blocks come from host memory one by one (student_parking)"
    if model is None or obstacle is not None:
        return nothing("torch.compile", str(obstacle))
    body: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    body.compile(backend=backend, dynamic=True)

    def undo() -> None:
        body._compiled_call_impl = None

    return AppliedOptimization(
        name="torch.compile",
        changes=(Change(what=f"forward of {type(body).__name__}", before="eager", after=f"compiled ({backend})"),),
        effect="not measured",
        undo_steps=[undo],
    )


def _finds_outliers(module: nn.Module) -> bool:
    return type(module) is bnb.nn.Linear8bitLt and module.state.threshold > 0


def check_optimizer(config: AnyRunConfig) -> None:
    """Refuse an `optim` that cannot work here.

    Raises:
        UserError: its library is not installed, or it cannot accumulate gradients and the step is split.
    """
    if (training := as_training(config)) is None:
        return
    optimizer = str(training.arguments.optim)
    for prefix, package in _LIBRARY_OF_OPTIMIZER.items():
        if optimizer.startswith(prefix) and not is_installed(package):
            raise UserError(
                f"optim={optimizer}, and the package {package} is not installed",
                expected="the optimizer's library in this environment",
                remedy=f"pip install {package.replace('_', '-')}, or optim=paged_adamw_8bit",
            )
    if optimizer in ("lomo", "adalomo") and training.gradient_accumulation_steps > 1:
        raise UserError(
            f"optim={optimizer} with {training.gradient_accumulation_steps} micro-batches per step",
            expected="one micro-batch a step: it updates inside backward and keeps no gradient to add up",
            remedy=f"per_device_train_batch_size={training.train_batch_size}, or optim=paged_adamw_8bit",
        )


def recover_from_nan(*, max_recoveries: int = 8, lr_backoff: float = 0.5) -> ChosenSettings:
    """The settings with which the trainer gets past non-finite values (`trainers/recovery.py` does it)."""
    return ChosenSettings(
        name="recovery from NaN",
        settings={"recover_from_nan": True, "max_recoveries": max_recoveries, "lr_backoff": lr_backoff},
        reason="one bad step no longer ends a run; one check of loss and gradient norm a step",
    )


class AsyncDataLoader:
    """Batches of `loader`, fetched by a thread while the last one is being used, and copied to `device` beside it.

    On a GPU tensors are pinned and copied on a stream of their own. Worth it where a batch takes time to make; the
    GRPO loop's batches are a few prompts. An exception of the loader is raised to the consumer; leaving the loop early
    stops the thread.

    Args:
        loader: anything that can be iterated more than once.
        device: where tensors (also inside dicts, lists and tuples) go; None leaves them where they are.
        num_prefetched: batches that may wait.
    """

    def __init__(
        self, loader: Iterable[Any], *, device: torch.device | str | None = None, num_prefetched: int = 2
    ) -> None:
        self.loader, self.num_prefetched = loader, num_prefetched
        self.device = torch.device(device) if device is not None else None
        self._stream = torch.cuda.Stream(self.device) if self.device and self.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        waiting: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(self.num_prefetched)
        stopped = threading.Event()
        thread = threading.Thread(target=self._fetch, args=(waiting, stopped), daemon=True)
        thread.start()
        try:
            while True:
                batch, error = waiting.get()
                if error is not None:
                    if isinstance(error, StopIteration):
                        return
                    raise error
                yield self._ready(batch)
        finally:
            stopped.set()
            thread.join()

    def _fetch(self, waiting: queue.Queue, stopped: threading.Event) -> None:
        try:
            for batch in self.loader:
                if not _put(waiting, (self._copied(batch), None), stopped):
                    return
            end: BaseException = StopIteration()
        except BaseException as error:  # handed to the consumer, which raises it
            end = error
        _put(waiting, (None, end), stopped)

    def _copied(self, batch: Any) -> Any:
        if self._stream is None:
            return _map_tensors(batch, lambda t: t.to(self.device)) if self.device is not None else batch
        with torch.cuda.stream(self._stream):
            copied = _map_tensors(batch, lambda t: t.pin_memory().to(self.device, non_blocking=True))
            done = self._stream.record_event()
        return copied, done

    def _ready(self, batch: Any) -> Any:
        """On a GPU: the consumer's stream waits for the copy, and the allocator learns who uses it."""
        if self._stream is None:
            return batch
        batch, done = batch
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(done)
        _map_tensors(batch, lambda t: t.record_stream(stream))
        return batch


def _put(waiting: queue.Queue, item: Any, stopped: threading.Event) -> bool:
    """False once the consumer is gone."""
    while not stopped.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
