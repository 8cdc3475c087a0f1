"""The library's arguments object, with its optimizer and its schedule made once on a stand-in model.

transformers makes both when training starts, after the models are loaded; what it refuses then is refused here.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from schemas.run import ConfigError

ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WIDTH, _TRIED_STEPS = 8, 4


class _OptimizerMaker(Trainer):
    """transformers' own code that makes optimizer and schedule, and nothing else of a trainer."""

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self.model = nn.ModuleDict({name: nn.Linear(_WIDTH, _WIDTH) for name in _LINEARS})
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None


def library_arguments(arguments_class: type[ArgumentsT], values: dict[str, Any]) -> ArgumentsT:
    """
    Raises:
        ConfigError: the library refuses a value, or an optimizer or a schedule with these values cannot be used.
    """
    try:
        arguments = arguments_class(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"- refused by the trainer: {error}") from error
    _try_optimizer(arguments)
    return arguments


def _try_optimizer(arguments: TrainingArguments) -> None:
    maker = _OptimizerMaker(arguments)
    state = torch.random.get_rng_state()
    try:
        optimizer = maker.create_optimizer()
        schedule = maker.create_scheduler(max(arguments.max_steps, 1), optimizer)
        for _ in range(_TRIED_STEPS):
            sum(linear(torch.ones(1, _WIDTH)).sum() for linear in maker.model.values()).backward()
            optimizer.step()
            schedule.step()
    except Exception as error:  # of any optimizer's package
        raise ConfigError(
            f"- `optim` {arguments.optim.value} with `optim_args` {arguments.optim_args!r}, `optim_target_modules` "
            f"{arguments.optim_target_modules!r} and `lr_scheduler_type` {arguments.lr_scheduler_type.value} cannot be "
            f"used: {type(error).__name__}: {error}. Set e.g. optim=adamw_8bit, and leave the others out."
        ) from error
    finally:
        torch.random.set_rng_state(state)
