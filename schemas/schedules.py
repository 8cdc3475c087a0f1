"""Schedules of the learning rate and arguments of optimizers: what each takes, and what it cannot do without.

transformers looks at them when training starts, after the models are loaded.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from schemas.values import PositiveInt, ShareFloat

OF_A_FIGURE = ("reduce_lr_on_plateau", "greedy")
"""`lr_scheduler_type`s that set the rate from the results instead of the steps."""

_Rate = Annotated[float, Field(ge=0, le=100)]
_Waves = Annotated[float, Field(gt=0, le=1e6)]
_Shape = Literal["linear", "cosine", "1-sqrt"]
_LEAST_RATE = {"num_cycles": _Waves, "min_lr": _Rate, "min_lr_rate": ShareFloat}

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": _Waves},
    "cosine_with_restarts": {"num_cycles": PositiveInt},
    "polynomial": {"lr_end": _Rate, "power": Annotated[float, Field(gt=0, le=100)]},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": PositiveInt},
    "cosine_with_min_lr": _LEAST_RATE,
    "cosine_warmup_with_min_lr": _LEAST_RATE | {"warmup_lr_rate": ShareFloat},
    "warmup_stable_decay": {
        "num_decay_steps": PositiveInt,
        "num_stable_steps": PositiveInt,
        "warmup_type": _Shape,
        "decay_type": _Shape,
        "min_lr_ratio": ShareFloat,
        "num_cycles": _Waves,
    },
}
"""`lr_scheduler_type` -> what `lr_scheduler_kwargs` may hold."""

_ONE_OF = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
_POLYNOMIAL_END = 1e-7
"""transformers' default of `lr_end`."""
_OPTIM_ARGS = re.compile(r"\s*\w+\s*=[^=,]+(,\s*\w+\s*=[^=,]+)*")


def scheduler_problems(arguments: Any) -> Iterator[str]:
    """What is wrong with `lr_scheduler_type` and `lr_scheduler_kwargs`, one line each."""
    schedule, given = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {}
    if schedule in OF_A_FIGURE:
        yield f"`lr_scheduler_type` {schedule} follows a figure, not the steps. Use e.g. cosine."
        return
    takes = SCHEDULES[schedule]
    for key, value in given.items():
        if key not in takes:
            instead = f"It takes {' and '.join(takes)}" if takes else "It takes nothing: remove it"
            yield f"`lr_scheduler_kwargs` names {key}, and `lr_scheduler_type` is {schedule}. {instead}."
            continue
        try:
            TypeAdapter(takes[key]).validate_python(value)
        except ValidationError as error:
            yield f"`lr_scheduler_kwargs.{key}` is {value!r}. {error.errors()[0]['msg']}."
            return
    needed = _ONE_OF.get(schedule, ())
    if needed and len(given.keys() & set(needed)) != 1:
        one = needed[0] if len(needed) == 1 else f"one of {' and '.join(needed)}"
        yield (
            f"`lr_scheduler_type` {schedule} needs {one} in `lr_scheduler_kwargs`. "
            f'Set e.g. "lr_scheduler_kwargs={{{needed[-1]}: {"0.1" if len(needed) > 1 else "100"}}}".'
        )
    yield from _end_above_the_rate(arguments.learning_rate, schedule, given)


def _end_above_the_rate(rate: float, schedule: str, given: dict[str, Any]) -> Iterator[str]:
    least = float(given.get("lr_end", _POLYNOMIAL_END) if schedule == "polynomial" else given.get("min_lr", 0))
    ends = schedule == "polynomial" or "min_lr" in given
    if ends and rate <= least:
        name = "lr_end" if schedule == "polynomial" else "min_lr"
        yield (
            f"`learning_rate` is {rate:g}, and `lr_scheduler_type` {schedule} lets it fall to {least:g} "
            f"(`lr_scheduler_kwargs.{name}`). Give {name} less than the learning rate."
        )


def optimizer_problems(arguments: Any) -> Iterator[str]:
    """What is wrong with the form of `optim_args`; each optimizer takes arguments of its own."""
    if arguments.optim_args is not None and not _OPTIM_ARGS.fullmatch(arguments.optim_args):
        yield f"`optim_args` is {arguments.optim_args!r}. Use name=value, and a comma before the next: a=1,b=2."
