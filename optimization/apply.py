"""The optimizations of a run configuration, in order: on the process, then on the models once they are loaded."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from core.log import console
from optimization.cuda_optim import autoconfigure_environment, enable_flash_attention, setup_cuda_optimizations
from optimization.fp8_optim import choose_fp8
from optimization.gpu import Card, find_card
from optimization.memory_optim import (
    offload_checkpoints,
    optimize_memory_for_device,
    preallocate_cuda_memory,
    tile_mlps,
)
from optimization.record import ChosenSettings, Obstacle, Record, nothing, records_table, undo_all
from optimization.training_optim import (
    DEFAULT_RUN,
    check_optimizer,
    choose_batch_size,
    compile_forward,
    compile_obstacle,
    planned_card,
    recover_from_nan,
    training_of,
)
from planner.constants import CUDA_CONTEXT_BYTES
from planner.plan import MemoryPlan, plan_run
from schemas.compose import compose_run_config
from schemas.methods import as_training, method_of
from schemas.run import AnyRunConfig, load_run_config


def apply_optimizations(config: AnyRunConfig, *, card: Card | None = None) -> tuple[AnyRunConfig, list[Record]]:
    """Apply what precedes the memory plan: settings of torch and its allocator, choices that depend on the GPU.

    Returns the configuration with those choices (attention kernel, fp8) and one record for each setting that is on;
    undo them with `undo_all` once the run is over.

    Raises:
        UserError: the optimizer cannot work here.
    """
    card = card or find_card()
    check_optimizer(config)
    records: list[Record] = []
    if config.expandable_segments:
        records.append(optimize_memory_for_device(card=card))
    if config.allow_tf32 or config.sdpa_backend != "torch":
        records.append(
            setup_cuda_optimizations(allow_tf32=config.allow_tf32, sdpa_backend=config.sdpa_backend, card=card)
        )
    choices: list[ChosenSettings | Obstacle] = []
    if config.use_flash_attention:
        if config.packs_rows:
            choices.append(
                nothing("flash attention", "packed samples are kept apart by a mask, which it does not take")
            )
        else:
            choices.append(enable_flash_attention(current=config.model_args.attn_implementation, card=card))
    if config.use_fp8:
        choices.append(choose_fp8(config, card=card))
    for choice in choices:
        if not isinstance(choice, Obstacle):
            config = with_settings(config, choice.settings)
    return config, [*records, *choices]


@contextlib.contextmanager
def optimized(config: AnyRunConfig) -> Iterator[AnyRunConfig]:
    """`apply_optimizations` for the duration of a run: logs what was done, and undoes it at the end."""
    config, records = apply_optimizations(config)
    if records:
        console.print(records_table(records))
    try:
        yield config
    finally:
        undo_all(records)


def with_settings(config: AnyRunConfig, settings: Mapping[str, Any]) -> AnyRunConfig:
    """The configuration with some of our own settings changed, those of `model_args` by their dotted name."""
    section = "model_args."
    args = {key.removeprefix(section): value for key, value in settings.items() if key.startswith(section)}
    own = {key: value for key, value in settings.items() if not key.startswith(section)}
    return replace(config, model_args=replace(config.model_args, **args), **own)


def preallocate_planned(config: AnyRunConfig, plan: MemoryPlan) -> list[Record]:
    """Take the plan's peak before anything is loaded, where `preallocate_memory` is on."""
    if not config.preallocate_memory:
        return []
    num_bytes = plan.max_bytes - int(CUDA_CONTEXT_BYTES.value)
    return [preallocate_cuda_memory(num_bytes, keep=not plan.settings.has_vllm)]


def optimize_models(
    config: AnyRunConfig, teacher: nn.Module, student: nn.Module | None, reference: nn.Module | None
) -> list[Record]:
    """Apply what changes the loaded models; None for a role that the teacher's own base plays.

    A run of a method without frozen models has one, in the teacher's place.
    """
    method = method_of(config)
    own = dict(zip(method.roles, (teacher, student, reference), strict=False))
    records: list[Record] = []
    if config.mlp_tile_tokens is not None:
        records += [_named(tile_mlps(m, config.mlp_tile_tokens), role) for role, m in own.items() if m is not None]
    records += _offloading(config)
    if config.compile_models and not method.frozen_roles:
        records.append(nothing("torch.compile", _no_frozen_model(config)))
    elif config.compile_models:
        records += [_named(compile_forward(own[role]), role) for role in method.frozen_roles]
    return records


def _no_frozen_model(config: AnyRunConfig) -> str:
    return f"{method_of(config).title} has no student and no reference"


def _named(record: Record, role: str) -> Record:
    return replace(record, name=f"{record.name}, {role}")


def announce_models(config: AnyRunConfig) -> list[Record]:
    """The settings that `optimize_models` and the trainer will act on here, before anything is loaded."""
    records: list[Record] = []
    if config.mlp_tile_tokens is not None:
        records.append(_once_loaded("tiled MLP", mlp_tile_tokens=config.mlp_tile_tokens))
    records += _offloading(config)
    if config.compile_models:
        obstacle: str | None = _no_frozen_model(config)
        if method_of(config).frozen_roles:
            obstacle = compile_obstacle(
                has_own_model=config.has_own_frozen_model,
                on_gpu=find_card() is not None,
                finds_outliers=config.frozen_find_outliers,
            )
        compiled = _once_loaded("torch.compile", compile_models=True)
        records.append(compiled if obstacle is None else nothing("torch.compile", obstacle))
    if config.preallocate_memory and find_card() is None:
        records.append(preallocate_cuda_memory(0))
    training = as_training(config)
    if training is not None and training.recover_from_nan:
        records.append(recover_from_nan(max_recoveries=training.max_recoveries, lr_backoff=training.lr_backoff))
    return records


def _offloading(config: AnyRunConfig) -> list[Record]:
    training = as_training(config)
    if training is None or not training.offload_checkpoints:
        return []
    return [offload_checkpoints(gradient_checkpointing=training.arguments.gradient_checkpointing)]


def _once_loaded(name: str, **settings: Any) -> ChosenSettings:
    return ChosenSettings(name=name, settings=settings, reason="done once the models are loaded")


def configure_all_optimizations(
    *,
    use_fp8: bool = True,
    prealloc_memory: bool = False,
    optimize_batch: bool = True,
    optimize_memory: bool = True,
    use_tf32: bool = True,
    use_flash_attention: bool = True,
    recover_nan: bool = True,
    run: str = DEFAULT_RUN,
    gpu_gb: float | None = None,
) -> dict[str, Any]:
    """Apply everything to this process for the run configuration `run`, e.g. in a notebook.

    Returns `batch_size` (micro-batch) and `gradient_accumulation_steps`, from the memory plan for the GPU that is here
    (`gpu_gb`: for one of that many decimal GB) or, without `optimize_batch`, as `run` has them; `settings` (key ->
    value, for `train.py`); `applied` (records; `undo_all` puts everything back).

    Raises:
        UserError: the run does not fit the GPU.
    """
    card = find_card()
    settings: dict[str, Any] = {
        "use_fp8": use_fp8,
        "preallocate_memory": prealloc_memory,
        "expandable_segments": optimize_memory,
        "offload_checkpoints": optimize_memory,
        "allow_tf32": use_tf32,
        "sdpa_backend": "auto" if use_tf32 else "torch",
        "use_flash_attention": use_flash_attention,
        "recover_from_nan": recover_nan,
        **({"gpu_gb": gpu_gb} if gpu_gb is not None else {}),
    }
    config = load_run_config(compose_run_config(run) | settings)
    applied: list[Record] = [autoconfigure_environment(card=card)]
    config, records = apply_optimizations(config, card=card)
    applied += records
    training = training_of(config)
    micro_batch, accumulation = training.arguments.per_device_train_batch_size, training.gradient_accumulation_steps
    if optimize_batch:
        choice = choose_batch_size(config, *planned_card(config, card))
        micro_batch, accumulation = choice.batch_size, choice.gradient_accumulation_steps
        applied.append(
            ChosenSettings(
                name="batch size", settings={"per_device_train_batch_size": micro_batch}, reason=choice.reason
            )
        )
    applied += preallocate_planned(config, plan_run(config, card.total_bytes if card else None))
    return {
        "batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "settings": settings | {"per_device_train_batch_size": micro_batch},
        "applied": applied,
    }
