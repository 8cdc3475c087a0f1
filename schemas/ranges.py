"""Ranges of TRL's and transformers' own settings: both check few of them, and most only while training.

The names are one list for every trainer: a run is asked about those that its arguments have.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from schemas.schedules import OF_A_FIGURE, SCHEDULES, optimizer_problems, scheduler_problems
from schemas.values import (
    AnyInt,
    CountingInt,
    Name,
    NotEmpty,
    NotNegativeFloat,
    PositiveInt,
    ShareFloat,
    TemperatureFloat,
)

_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_ShareAbove0 = Annotated[float, Field(ge=0.001, le=1)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_Clip = Annotated[float, Field(ge=0, le=1e6)]
_SigmoidTemperature = Annotated[float, Field(ge=0.001, le=1000)]
_GammaShape = Annotated[float, Field(ge=0, le=100)]

_RENDERING = {"conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding"} | {
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs")
}
"""Arguments of `apply_chat_template` that say how it renders, not what the template is given."""


def _not_rendering(kwargs: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_RENDERING & kwargs.keys()):
        raise ValueError(
            f"`chat_template_kwargs` names {', '.join(taken)}, which the rendering of prompts sets itself. Give "
            "variables of the chat template alone, such as {enable_thinking: false}."
        )
    return kwargs


RANGES: dict[str, Any] = {
    "adam_beta1": _Momentum,
    "adam_beta2": _Momentum,
    "adam_epsilon": Annotated[float, Field(ge=1e-30, le=1)],  # 0 is 0 / 0 where a gradient is 0, as LoRA's A at first
    "beta": Annotated[float, Field(ge=0, le=1000)],
    "chat_template_kwargs": Annotated[dict[str, Any], AfterValidator(_not_rendering)] | None,
    "data_seed": _Seed | None,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=256)],
    "debug": Literal["", "underflow_overflow"],
    "delta": Annotated[float, Field(ge=1, le=1e6)] | None,
    "epsilon": _Clip,
    "epsilon_high": _Clip | None,
    "eval_delay": NotNegativeFloat,
    "hub_model_id": Name | None,
    "hub_revision": Name | None,
    "importance_sampling_level": Literal["token", "sequence"],
    "learning_rate": Annotated[float, Field(ge=0, le=100)],
    "log_completions_hub_repo": Name | None,
    "log_level": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "loss_type": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "lr_scheduler_type": Literal[*SCHEDULES, *OF_A_FIGURE],
    "max_completion_length": PositiveInt,
    "max_grad_norm": NotNegativeFloat,
    "max_length": PositiveInt | None,
    "min_p": ShareFloat | None,
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "neftune_noise_alpha": Annotated[float, Field(ge=0, le=1e4)] | None,
    "num_generations": AnyInt,
    "num_iterations": PositiveInt,
    "num_train_epochs": NotNegativeFloat,
    "off_policy_mask_threshold": NotNegativeFloat | None,
    "optim_target_modules": Name | NotEmpty[Name] | None,
    "output_dir": Name,
    "per_device_train_batch_size": PositiveInt,
    "project": Name,
    "ref_model_mixup_alpha": ShareFloat,
    "ref_model_sync_steps": PositiveInt,
    "repetition_penalty": Annotated[float, Field(ge=0.01, le=100)],
    "reward_weights": list[Annotated[float, Field(ge=-1e6, le=1e6)]] | None,
    "run_name": Name,
    "sapo_temperature_neg": _SigmoidTemperature,
    "sapo_temperature_pos": _SigmoidTemperature,
    "save_strategy": Literal["no", "steps", "epoch"],
    "scale_rewards": Literal["group", "batch", "none"],
    "seed": _Seed,
    "temperature": TemperatureFloat,
    "top_k": CountingInt,
    "top_p": _ShareAbove0,
    "trackio_bucket_id": Name | None,
    "trackio_space_id": Name | None,
    "trackio_static_space_id": Name | Literal[False] | None,
    "train_sampling_strategy": Literal["random", "sequential"],
    "vespo_k_neg": _GammaShape,
    "vespo_k_pos": _GammaShape,
    "vespo_lambda_neg": _GammaShape,
    "vespo_lambda_pos": _GammaShape,
    "vllm_gpu_memory_utilization": _ShareAbove0,
    "vllm_importance_sampling_clip_max": _Clip | None,
    "vllm_importance_sampling_clip_min": _Clip | None,
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "warmup_steps": NotNegativeFloat,
    "weight_decay": Annotated[float, Field(ge=0, le=100)],
}
"""Setting -> the type that holds its possible values, in place of the library's wider one."""


def schedule_problems(arguments: Any) -> Iterator[str]:
    """Problems with the length of a run and with what happens every so many steps, one line each."""
    steps, epochs = arguments.max_steps, arguments.num_train_epochs
    if steps < 1 and steps != -1:
        yield f"`max_steps` is {steps}. Use 1 or more, or -1 to train for `num_train_epochs`."
    elif steps == -1 and epochs <= 0:
        yield f"`num_train_epochs` is {epochs:g} with `max_steps` -1: nothing is trained. Set one of them above 0."
    yield from scheduler_problems(arguments)
    yield from optimizer_problems(arguments)
    for key in ("dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor"):
        if getattr(arguments, key) and not arguments.dataloader_num_workers:
            yield f"`{key}` is for worker processes, and `dataloader_num_workers` is 0. Remove it, or set that above 0."
    for what in ("logging", "save", "eval"):
        every, strategy = getattr(arguments, f"{what}_steps"), getattr(arguments, f"{what}_strategy")
        if strategy == "steps" and every is not None and every <= 0:
            yield f"`{what}_steps` is {every:g} with `{what}_strategy` steps. Use 1 or more, or {what}_strategy=no."
