"""Ranges of TRL's and transformers' own settings: both check few of them, and most only while training.

The names are one list for every trainer: a run is asked about those that its arguments have.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from schemas.model import PositiveInt

_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_NotNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_ShareAbove0 = Annotated[float, Field(gt=0, le=1)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]

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
    "adam_epsilon": _NotNegative,
    "beta": _NotNegative,
    "chat_template_kwargs": Annotated[dict[str, Any], AfterValidator(_not_rendering)] | None,
    "data_seed": _Seed | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0)],
    "debug": Literal["", "underflow_overflow"],
    "epsilon": _NotNegative,
    "importance_sampling_level": Literal["token", "sequence"],
    "learning_rate": _NotNegative,
    "loss_type": Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
    "max_completion_length": PositiveInt,
    "max_grad_norm": _NotNegative,
    "min_p": _Share | None,
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "num_generations": int,
    "num_iterations": PositiveInt,
    "per_device_train_batch_size": PositiveInt,
    "ref_model_mixup_alpha": _Share,
    "ref_model_sync_steps": PositiveInt,
    "repetition_penalty": _Positive,
    "save_strategy": Literal["no", "steps", "epoch"],
    "scale_rewards": Literal["group", "batch", "none"],
    "seed": _Seed,
    "temperature": _Positive,
    "top_k": Annotated[int, Field(ge=0)],
    "top_p": _ShareAbove0,
    "train_sampling_strategy": Literal["random", "sequential"],
    "vllm_gpu_memory_utilization": _ShareAbove0,
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "warmup_steps": _NotNegative,
    "weight_decay": _NotNegative,
}
"""Setting -> the type that holds its possible values, in place of the library's wider one."""


def schedule_problems(arguments: Any) -> Iterator[str]:
    """Problems with the length of a run and with what happens every so many steps, one line each."""
    steps, epochs = arguments.max_steps, arguments.num_train_epochs
    if steps < 1 and steps != -1:
        yield f"`max_steps` is {steps}. Use 1 or more, or -1 to train for `num_train_epochs`."
    elif steps == -1 and epochs <= 0:
        yield f"`num_train_epochs` is {epochs:g} with `max_steps` -1: nothing is trained. Set one of them above 0."
    if arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        yield f"`lr_scheduler_type` {arguments.lr_scheduler_type} follows a figure, not the steps. Use e.g. cosine."
    for what in ("logging", "save", "eval"):
        every, strategy = getattr(arguments, f"{what}_steps"), getattr(arguments, f"{what}_strategy")
        if strategy == "steps" and every is not None and every <= 0:
            yield f"`{what}_steps` is {every:g} with `{what}_strategy` steps. Use 1 or more, or {what}_strategy=no."
