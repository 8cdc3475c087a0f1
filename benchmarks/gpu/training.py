"""Measured training steps of a shipped run configuration on a random model: time and memory by component."""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer, TrainerCallback

import generation.choose
import generation.start
import trainers.build
from benchmarks.gpu.cell import Setup, SkipCell
from benchmarks.gpu.memory import (
    DriverWatch,
    MemoryCap,
    component_table,
    difference,
    module_bytes,
    optimizer_state_bytes,
    outside_torch_bytes,
    phase_rows,
    planned_components,
    tensor_bytes,
    touch_card,
    used_bytes,
    vllm_pool_bytes,
)
from benchmarks.gpu.random_model import ensure_random_model, write_questions
from benchmarks.gpu.runner import Figures
from core.types import Phase
from core.units import format_gb, gb
from generation import Canary, SamplingSettings
from generation.vllm_engine import VLLMGenerator
from models.host import ModelHost
from models.meter import PhaseMeter
from optimization import optimized
from optimization.gpu import has_gpu, memory_of
from planner.fit import own_card_bytes
from planner.plan import MemoryPlan, plan_run
from preflight.hardware import check_hardware_and_plan, load_for_this_machine
from rollout.scoring import RolloutScorer
from schemas.compose import compose_run_config
from schemas.methods import as_kind
from schemas.run import RunConfig, load_run_config, resolved_values
from trainers.teacher_grpo import TeacherGRPOTrainer

# No evaluation, no checkpoints. The rate is high so that the canary can tell whether a swapped adapter arrived.
_BARE_STEPS = (
    *("num_eval_prompts=0", "eval_strategy=no", "eval_on_start=false", "save_strategy=no", "resume=never"),
    *("logging_steps=1", "learning_rate=1e-3", "report_to=none", "max_steps=2"),
)
_TINY_LENGTHS = (
    *("train_batch_size=4", "num_generations=4", "per_device_train_batch_size=2", "generation_aggregation_steps=1"),
    *("max_prompt_length=768", "max_completion_length=32", "kv_cache_gb=0.1"),
)
_ROWS = 16
"""Completions of a step: one prompt group. The peaks depend on the lengths and the micro-batch; the KV cache and vLLM's
share are those of the whole configuration."""


@dataclass
class Stopwatch:
    """Calls and seconds of the parts of a step."""

    calls: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if has_gpu():
                    torch.cuda.synchronize()
                self.calls.setdefault(name, []).append(time.perf_counter() - started)

        return call


_TIMED: tuple[tuple[str, Any, str], ...] = (
    ("load", ModelHost, "__init__"),
    ("export", generation.choose, "export_for_vllm"),
    ("engine start", VLLMGenerator, "__init__"),
    ("adapter swap", VLLMGenerator, "sync_adapter"),
    ("canary", Canary, "check"),
    ("sleep", VLLMGenerator, "sleep"),
    ("wake", VLLMGenerator, "wake"),
    ("generation", VLLMGenerator, "generate"),
    ("scoring", RolloutScorer, "__call__"),
)


class _StepSizes(TrainerCallback):
    """Bytes that exist only at moments of a step."""

    def __init__(self) -> None:
        self.gradient_bytes = self.optimizer_bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient_bytes = tensor_bytes(p.grad for p in model.parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.optimizer_bytes = optimizer_state_bytes(optimizer)


def whole_configuration(setup: Setup, figures: Figures) -> None:
    """Part a: the configuration for 85 GB, every mechanism of a step, peak per phase and component beside the plan."""
    measure_run(setup, figures, setup.arguments["config"], setup.shape)


def small_card(setup: Setup, figures: Figures) -> None:
    """Part e: a configuration for a small GPU, on a GPU made as small."""
    shape = "tiny" if setup.is_tiny else setup.arguments["shape"]
    measure_run(setup, figures, setup.arguments["config"], shape, capped=True)


def measure_run(setup: Setup, figures: Figures, config_name: str, shape: str, *, capped: bool = False) -> None:
    on_card = has_gpu()
    card_bytes = own_card_bytes(compose_run_config(config_name))
    if on_card and not setup.is_tiny and memory_of(torch.device("cuda:0")) < 0.97 * card_bytes:
        raise SkipCell(f"{config_name} is for {format_gb(card_bytes)}, and this GPU has less")
    for left_behind in setup.scratch.glob(f"{setup.cell}*"):  # by a call that was killed: as large as the model
        shutil.rmtree(left_behind)
    checkpoint = ensure_random_model(shape, setup.scratch / "models")
    words = _words(setup, config_name, checkpoint, card_bytes)
    prompt_lens = write_questions(
        setup.scratch / "questions.jsonl",
        AutoTokenizer.from_pretrained(checkpoint),
        compose_run_config(config_name, words)["max_prompt_length"],
    )
    cap = MemoryCap(card_bytes) if capped and on_card else None
    if cap is not None:
        utilization = compose_run_config(config_name, words)["vllm_gpu_memory_utilization"]
        words += (f"vllm_gpu_memory_utilization={cap.share(utilization):.4f}",)
    figures.update(
        config=config_name,
        card_gb=gb(card_bytes),
        overrides=list(words),
        capped="torch's and vLLM's shares of the GPU" if cap else "no: there is no CUDA device" if capped else None,
        rows=compose_run_config(config_name, words)["train_batch_size"],
        prompt_len=mean(prompt_lens),
    )
    values = compose_run_config(config_name, words)
    config = load_for_this_machine(values)
    watch, stopwatch = DriverWatch(), Stopwatch()
    with optimized(config) as chosen, watch.watching(), _instrumented(watch, stopwatch, cap):
        teacher_config = as_kind(chosen, RunConfig)
        assert teacher_config is not None, "speed and memory are measured on teachers' runs"
        peak_bytes = _run(teacher_config, values, figures, watch, stopwatch)
    if cap is not None and peak_bytes > cap.card_bytes:
        raise RuntimeError(f"a peak of {format_gb(peak_bytes)} on a GPU that stands for {format_gb(cap.card_bytes)}")


def _words(setup: Setup, config_name: str, checkpoint: Path, card_bytes: int) -> tuple[str, ...]:
    words: tuple[str, ...] = (
        *(f"model_name_or_path={checkpoint}", "data_cfg=local"),
        *(f"dataset_id_or_path={setup.scratch / 'questions.jsonl'}", f"output_dir={setup.scratch / setup.cell}"),
        *_BARE_STEPS,
    )
    if compose_run_config(config_name)["student_model"] is not None:
        words += (f"student_model={checkpoint}",)
    if setup.is_tiny:
        return (*words, *_TINY_LENGTHS)
    whole = load_run_config(compose_run_config(config_name, words))
    kv_cache_gb = gb(plan_run(whole, card_bytes).kv_cache_bytes)
    rows = (f"train_batch_size={_ROWS}", f"num_generations={_ROWS}", f"kv_cache_gb={kv_cache_gb:.3f}")
    return (*words, *rows, f"gpu_gb={gb(card_bytes)}")


@contextmanager
def _instrumented(watch: DriverWatch, stopwatch: Stopwatch, cap: MemoryCap | None) -> Iterator[None]:
    """Phases are watched, calls timed, no row ends early, and the cap follows the engine's sleep."""
    phase_of, start, make_generator = PhaseMeter.phase, VLLMGenerator.__init__, generation.start.make_generator

    @contextmanager
    def watched(meter: PhaseMeter, phase: Phase) -> Iterator[None]:
        with watch.phase(phase), phase_of(meter, phase):
            yield

    def start_unwatched(generator: VLLMGenerator, *args: Any) -> None:
        with watch.paused():
            start(generator, *args)

    def without_stop_tokens(*args: Any, sampling: SamplingSettings, **kwargs: Any) -> Any:
        return make_generator(*args, sampling=replace(sampling, stop_token_ids=()), **kwargs)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(VLLMGenerator, "__init__", start_unwatched))
        for name, owner, attribute in _TIMED:
            timed = stopwatch.timed(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, timed))
        if cap is not None:
            patches.enter_context(mock.patch.object(VLLMGenerator, "sleep", _and_then(VLLMGenerator.sleep, cap)))
            patches.enter_context(mock.patch.object(VLLMGenerator, "wake", _and_then(VLLMGenerator.wake, cap)))
        patches.enter_context(mock.patch.object(PhaseMeter, "phase", watched))
        patches.enter_context(mock.patch.object(generation.start, "make_generator", without_stop_tokens))
        yield


def _and_then(call: Callable[..., Any], cap: MemoryCap) -> Callable[..., Any]:
    def both(self: Any) -> None:
        call(self)
        cap.apply()

    return both


def _run(config: RunConfig, values: dict[str, Any], figures: Figures, watch: DriverWatch, stopwatch: Stopwatch) -> int:
    """Train, report; returns the highest peak by the driver, 0 without a GPU."""
    context_bytes = None
    if has_gpu():
        touch_card()
        context_bytes = outside_torch_bytes()
    plan, device = check_hardware_and_plan(config)
    prepared = trainers.build.check_before_loading(config, resolved_values(config, values), plan, device)
    trainer, sizes = None, _StepSizes()
    try:
        trainer = trainers.build.build_trainer(prepared)
        trainer.add_callback(sizes)
        trainer.train()
        _report(trainer, plan, figures, watch, stopwatch, _measured(trainer, sizes, context_bytes))
        figures.update(steps=_logged_steps(prepared.folder.metrics_file))
    finally:
        if trainer is not None:
            trainer.close()
        shutil.rmtree(prepared.folder.path, ignore_errors=True)  # the export in it is as large as the model
    return max(watch.peak_bytes.values(), default=0)


def _measured(trainer: TeacherGRPOTrainer, sizes: _StepSizes, context_bytes: int | None) -> dict[str, float]:
    """Component -> measured GB, under the plan's names; what only a GPU can tell is absent without one."""
    host = trainer.host
    measured = {
        "teacher": module_bytes(host.teacher, adapters=False),
        "adapter": module_bytes(host.teacher, adapters=True),
        "gradients": sizes.gradient_bytes,
        "optimizer states": sizes.optimizer_bytes,
    }
    if host.student is not None:
        measured["student"] = module_bytes(host.student, adapters=False)
    if context_bytes is not None:
        torch.cuda.empty_cache()
        use, pool = host.meter.checkpoint_use(), vllm_pool_bytes(asleep=True)
        at_rest = torch.cuda.memory_allocated() - pool
        known = sum(measured.values()) - measured["gradients"]  # dropped after the optimizer's step
        measured |= {
            "CUDA context": context_bytes,
            "vLLM weights": vllm_pool_bytes("weights"),
            "KV cache": vllm_pool_bytes("kv_cache"),
            "vLLM residue": used_bytes() - context_bytes - known,
            f"activations, {Phase.TRAIN}": use[Phase.TRAIN].peak_allocated_bytes - at_rest - measured["gradients"],
            f"activations, {Phase.SCORE}": use[Phase.SCORE].peak_allocated_bytes - at_rest,
        }
        for phase in (Phase.TRAIN, Phase.SCORE):
            measured[f"allocator, {phase}"] = use[phase].peak_reserved_bytes - use[phase].peak_allocated_bytes
    return {name: gb(size) for name, size in measured.items()}


def _report(
    trainer: TeacherGRPOTrainer,
    plan: MemoryPlan,
    figures: Figures,
    watch: DriverWatch,
    stopwatch: Stopwatch,
    measured: dict[str, float],
) -> None:
    phases, config_name = phase_rows(plan, trainer.host.meter, watch), trainer.config.run_name
    sampler = trainer.sampler
    figures.update(
        phases=phases,
        components={"planned_gb": planned_components(plan), "measured_gb": measured},
        calls=stopwatch.calls,
        generator=sampler.generator.weights if sampler is not None else "none",
        peaks_gb={name: row["driver_gb"] for name, row in phases.items() if row["driver_gb"] is not None},
    )
    figures.add_table(
        f"{config_name}: peak of each phase, GB",
        ("phase", "planned", "measured (driver)", "difference", "torch reserved", "torch allocated", "seconds"),
        [
            [
                name,
                f"{row['planned_gb']:.2f}",
                *_cells(row, "driver_gb"),
                difference(row["planned_gb"] or 0.0, row["driver_gb"]),
                *_cells(row, "reserved_gb", "allocated_gb"),
                f"{row['seconds']:.1f}",
            ]
            for name, row in phases.items()
        ],
    )
    figures.add_table(
        f"{config_name}: components, GB",
        ("component", "planned", "measured", "difference"),
        component_table(planned_components(plan), measured),
    )
    figures.add_table(
        "what a step is made of, seconds",
        ("what", "calls", "first", "mean of the others"),
        [
            [name, str(len(seconds)), f"{seconds[0]:.2f}", f"{mean(seconds[1:]):.2f}" if seconds[1:] else ""]
            for name, seconds in stopwatch.calls.items()
        ],
    )


def _cells(row: dict[str, float | None], *names: str) -> list[str]:
    return [f"{row[name]:.2f}" if row[name] is not None else "" for name in names]


def _logged_steps(metrics_file: Path) -> Sequence[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]
