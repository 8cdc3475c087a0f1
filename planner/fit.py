"""What fits a GPU: the largest micro-batch, context and model of a configuration, and the nearest one that fits.

Configurations here are composed values (plain containers, flat keys), so that whatever is proposed is a command line.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.errors import UserError
from core.types import Phase
from core.units import gb
from planner.changes import divisors, family_sizes
from planner.plan import MemoryPlan, plan, plan_run, usable_bytes
from planner.settings import PlanSettings
from planner.shapes import known_shapes
from schemas.run import ConfigError, load_run_config

AUTO = "auto"
_CONTEXT_STEP = 256
_WORTH_BYTES = 1e8
"""What a change must save to be spoken of."""


def resolve_auto(values: Mapping[str, Any], gpu_bytes: int | None) -> dict[str, Any]:
    """`per_device_train_batch_size: auto` as the largest divisor of `train_batch_size` that fits the GPU.

    Call before `load_run_config`. Gradient accumulation then stays whole; prompt groups may span micro-batches, since
    advantages are computed over the whole generation batch. `gpu_gb` of the configuration goes before `gpu_bytes`;
    without a GPU, or where nothing fits, the value is 1 and the plan says the rest.
    """
    resolved = dict(values)
    if resolved.get("per_device_train_batch_size") != AUTO:
        return resolved
    resolved["per_device_train_batch_size"] = 1
    config = load_run_config(resolved)
    card = int(config.gpu_gb * 1e9) if config.gpu_gb else gpu_bytes
    if card is not None:
        settings = plan_run(config, card).settings
        resolved["per_device_train_batch_size"] = largest_micro_batch(settings, card) or 1
    return resolved


def own_card_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of the GPU that a run configuration is for (`card_gb`), whatever GPU is here.

    Raises:
        ConfigError: the configuration is not valid.
    """
    return int(load_run_config(resolve_auto(values, None)).card_gb * 1e9)


def largest_micro_batch(settings: PlanSettings, gpu_bytes: int) -> int | None:
    """Largest divisor of the train batch with which every phase fits; None: not even 1."""
    candidates = divisors(settings.train_batch)
    return _last_that_fits(candidates, lambda rows: replace(settings, micro_batch=rows), gpu_bytes)


def largest_context(settings: PlanSettings, gpu_bytes: int) -> int | None:
    """Largest prompt + completion length, in the configuration's proportion, up to what the model was trained for."""
    candidates = range(_CONTEXT_STEP, settings.teacher.max_positions + 1, _CONTEXT_STEP)
    return _last_that_fits(candidates, lambda row_len: with_row_len(settings, row_len), gpu_bytes)


def with_row_len(settings: PlanSettings, row_len: int, *, micro_batch: int | None = None) -> PlanSettings:
    """The run with rows of another length, prompt and completion in the configuration's proportion."""
    prompt_len = round(row_len * settings.max_prompt_len / settings.row_len)
    return replace(
        settings,
        max_prompt_len=prompt_len,
        max_completion_len=row_len - prompt_len,
        micro_batch=settings.micro_batch if micro_batch is None else micro_batch,
    )


def largest_model(settings: PlanSettings, gpu_bytes: int) -> str | None:
    """Largest Qwen2.5 that can be teacher (and student, where there is one), the rest as it is; None: none can."""
    runs = {name: settings.with_model(known_shapes()[name.lower()]) for name in family_sizes()}
    known = {name: run for name, run in runs.items() if run is not None}
    return _last_that_fits(list(known), known.__getitem__, gpu_bytes)


def _last_that_fits(candidates: Any, settings_of: Callable[[Any], PlanSettings], gpu_bytes: int) -> Any:
    """Bisection: memory grows along the candidates, so those that fit come first."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if plan(settings_of(candidates[middle]), gpu_bytes).fits():
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of a configuration and what it is worth."""

    change: str
    """In words, e.g. `micro-batch 2 -> 1`."""
    overrides: Mapping[str, Any]
    phase: Phase
    """Where it saves most."""
    saved_bytes: int

    @property
    def words(self) -> str:
        return " ".join(override_word(key, value) for key, value in self.overrides.items())


def override_word(key: str, value: Any) -> str:
    """`key=value` for the command line."""
    if value is None or isinstance(value, bool):
        return f"{key}={'null' if value is None else str(value).lower()}"
    return f"{key}={value}"


def levers(values: Mapping[str, Any]) -> list[Lever]:
    """Savings of single changes, the mildest first; changes that save under 0.1 GB are left out."""
    before = plan_run(load_run_config(values), None)
    found = []
    for change, overrides in before.settings.changes():
        try:
            after = plan_run(load_run_config(with_overrides(values, overrides)), None)
        except ConfigError:  # e.g. 4 bits with a vLLM server: not a change that this configuration can make
            continue
        saved = {p: before.peak_bytes(p) - after.peak_bytes(p) for p in (Phase.TRAIN, Phase.GENERATE, Phase.SCORE)}
        phase = max(saved, key=lambda p: saved[p])
        if saved[phase] > _WORTH_BYTES:
            found.append(Lever(change=change, overrides=overrides, phase=phase, saved_bytes=saved[phase]))
    return found


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Composed values with flat or dotted keys changed."""
    changed = dict(values)
    for key, value in overrides.items():
        section, _, field = key.rpartition(".")
        if section:
            changed[section] = {**(changed.get(section) or {}), field: value}
        else:
            changed[key] = value
    return changed


def nearest_fit(values: Mapping[str, Any], gpu_bytes: int) -> dict[str, Any]:
    """Overrides with which the configuration fits the GPU, as few and as mild as it goes; empty: it fits as it is.

    Walks through the changes of its settings in order, taking each that lowers the highest peak, until it fits; then
    drops what turns out not to be needed, the severest first.

    Raises:
        UserError: even the smallest built-in model does not fit.
    """
    steps: list[dict[str, Any]] = []
    while not (current := _planned(values, steps, gpu_bytes)).fits():
        goal = current.max_bytes - _WORTH_BYTES
        step = next(
            (new for _, new in current.settings.changes() if _peak_bytes(values, [*steps, new], gpu_bytes) < goal), None
        )
        if step is None:
            raise UserError(
                f"a GPU of {gb(gpu_bytes):.1f} GB for {current.settings.teacher.name}",
                expected=f"{gb(current.max_bytes):.1f} GB ({current.binding_phase} phase, with every lever pulled)",
                remedy="use a larger GPU, or ./launch_mono.sh for the embedded model on the CPU",
            )
        steps.append(step)
    for step in reversed(list(steps)):
        without = [other for other in steps if other is not step]
        if _planned(values, without, gpu_bytes).fits():
            steps = without
    return {key: value for step in steps for key, value in step.items()}


def _merged(values: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return functools.reduce(with_overrides, steps, values)


def _planned(values: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], gpu_bytes: int) -> MemoryPlan:
    return plan_run(load_run_config(_merged(values, steps)), gpu_bytes)


def _peak_bytes(values: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], gpu_bytes: int) -> float:
    """Infinite where the steps do not make a valid configuration."""
    try:
        return _planned(values, steps, gpu_bytes).max_bytes
    except ConfigError:
        return math.inf


def why_not(memory_plan: MemoryPlan) -> str:
    """One sentence: what exceeds the GPU of the plan, and by how much."""
    if memory_plan.gpu_bytes is None:
        raise ValueError("this plan was made without a GPU")
    if memory_plan.kv_is_too_small:
        return "the KV cache that is set does not hold one row of full length: raise kv_cache_gb or leave it on auto"
    usable, phase = usable_bytes(memory_plan.gpu_bytes), memory_plan.binding_phase
    name, size = max(memory_plan.components[phase].items(), key=lambda item: item[1])
    return (
        f"the {phase} phase needs {gb(memory_plan.max_bytes):.1f} GB and {gb(usable):.1f} GB are usable; "
        f"its largest part is {name} with {gb(size):.1f} GB"
    )
