"""TRL's GRPOConfig from our configuration."""

from typing import Any

from trl import GRPOConfig

from schemas.run import RunConfig
from trainers.arguments import library_arguments


def build_grpo_args(
    config: RunConfig, *, use_cpu: bool, resuming: bool = False, num_held_out: int | None = None
) -> GRPOConfig:
    """TRL's arguments: what the configuration sets, and what follows from our own settings.

    `num_held_out: None` is what the configuration asks for; a small dataset may have none to hold out.

    `sync_ref_model` is ours (TRL refuses it with an adapter), so TRL is told that it is off. One training step is one
    optimizer step over the whole batch: micro-batches are made inside it (trainers/teacher_grpo.py).

    Raises:
        ConfigError: TRL or transformers refuse a value (trainers/arguments.py).
    """
    values: dict[str, Any] = config.grpo.model_dump(exclude_unset=True)
    num_held_out = config.num_eval_prompts if num_held_out is None else num_held_out
    has_eval = num_held_out > 0 and values.get("eval_strategy", "no") != "no"
    values |= {
        "use_cpu": use_cpu,
        "use_vllm": config.use_vllm_server,
        "vllm_mode": "server",
        "vllm_importance_sampling_correction": config.importance_sampling_correction is True,
        "per_device_train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations_eval": 1,
        "sync_ref_model": False,
        "eval_strategy": values.get("eval_strategy", "no") if has_eval else "no",
        "eval_on_start": has_eval and bool(values.get("eval_on_start")) and not resuming,
        "log_completions": True,
        "num_completions_to_print": 0,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return library_arguments(GRPOConfig, values)
