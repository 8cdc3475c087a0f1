"""Recovery from a non-finite loss, gradient or reward: skip the step, lower the rate, roll back, stop.

A bad step changes nothing: its gradients are dropped before the optimizer sees them. The second bad step in a row also
multiplies the learning rate by `lr_backoff`; the third lowers it again and goes back to the last good checkpoint
(adapters, optimizer, schedule, random generators, place in the data; the generator gets the restored adapter). A step
after which the trained weights are not finite goes back at once.
Counts are those of this process; the lowered rate is saved with the checkpoints.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from core.errors import NonFiniteError
from core.log import log
from runs.checkpoints import checkpoints, damage, first_whole

_STEPS_UNTIL_LOWER, _STEPS_UNTIL_ROLL_BACK = 2, 3


class RollBackError(Exception):
    """Leaves the training loop; the trainer starts it again from the last good checkpoint."""


class Recovery(TrainerCallback):
    """Watches the steps of one trainer and decides what a bad one leads to.

    Args:
        max_recoveries: bad steps that are forgiven.
        lr_backoff: factor of the learning rate at each backing off.
        report: writes a dictionary to the metrics.
        save: writes a checkpoint of the current state.

    Raises:
        RollBackError: from the end of the third bad step in a row, or of one that spoilt the weights.
        NonFiniteError: at one bad step more than `max_recoveries`.
    """

    def __init__(
        self,
        *,
        max_recoveries: int,
        lr_backoff: float,
        report: Callable[[dict[str, Any]], None],
        save: Callable[[], None],
    ) -> None:
        self.max_recoveries, self.lr_backoff = max_recoveries, lr_backoff
        self._report, self._save = report, save
        self.cause: str | None = None
        """Why the step at work is bad; None while it is good."""
        self.num_bad_steps = self.num_roll_backs = self._num_in_a_row = 0
        self._lr_scale = 1.0

    def check(self, what: str, value: float | torch.Tensor) -> bool:
        """Whether a value is finite; the first that is not makes the step a bad one."""
        is_finite = math.isfinite(value)
        if not is_finite and self.cause is None:
            self.cause = f"{what} is {float(value)}"
        return is_finite

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rate stays as low as it was: as the loaded checkpoint has it, or as this process lowered it since."""
        self.cause, self._num_in_a_row = None, 0
        loaded_scale = kwargs["lr_scheduler"].base_lrs[0] / args.learning_rate
        self._lr_scale = min(self._lr_scale, loaded_scale)
        scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self._lr_scale / loaded_scale)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first step has something to go back to as well."""
        if state.global_step == 0 and not checkpoints(Path(str(args.output_dir))):
            self._save()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_spoilt = not _are_finite(p for p in kwargs["model"].parameters() if p.requires_grad)
        if is_spoilt and self.cause is None:
            self.cause = "the trained weights are not finite"
        if self.cause is None:
            self._num_in_a_row = 0
            return
        cause, self.cause = self.cause, None
        self._num_in_a_row += 1
        self.num_bad_steps += 1
        control.should_save = False  # a bad step is nothing to go back to
        if self.num_bad_steps > self.max_recoveries:
            self._tell("stop", cause, state, control)
            raise NonFiniteError(
                f"step {state.global_step}: {cause}; {self.max_recoveries} bad steps were forgiven (max_recoveries) "
                f"with {self.num_roll_backs} roll-backs, at the end at {self._lr_scale:g} of the learning rate. "
                f"The checkpoints in {args.output_dir} are good: go on from one with a lower learning_rate."
            )
        if self._num_in_a_row >= _STEPS_UNTIL_LOWER:
            self._lr_scale *= self.lr_backoff
            scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.lr_backoff)
        if is_spoilt or self._num_in_a_row >= _STEPS_UNTIL_ROLL_BACK:
            self.num_roll_backs += 1
            self._tell("roll back", cause, state, control)
            raise RollBackError
        self._tell("lower rate" if self._num_in_a_row >= _STEPS_UNTIL_LOWER else "skip", cause, state, control)

    def _tell(self, action: str, cause: str, state: TrainerState, control: TrainerControl) -> None:
        log.warning("step %d: %s; %s, learning rate x %g", state.global_step, cause, action, self._lr_scale)
        should_log = control.should_log
        self._report(
            {
                "recovery/action": action,
                "recovery/cause": cause,
                "recovery/bad_steps": self.num_bad_steps,
                "recovery/roll_backs": self.num_roll_backs,
                "recovery/learning_rate_scale": self._lr_scale,
            }
        )
        control.should_log = should_log  # reporting cleared it, and the step has its own line to come


def scale_rate(optimizer: Any, lr_scheduler: Any, factor: float) -> None:
    """Multiply the learning rate from now on, whatever the schedule: its base and what is set for the next step."""
    lr_scheduler.base_lrs = [base * factor for base in lr_scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the trainer logs


def _are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all values of the floating tensors are; the device is asked once."""
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(floating, norm_type=math.inf))


def last_good_checkpoint(output_dir: Path) -> Path:
    """The newest whole checkpoint whose adapter (or model, where all weights are trained) and optimizer state have only
    finite values.

    Raises:
        NonFiniteError: there is none.
    """
    good, problems = first_whole(checkpoints(output_dir).values(), lambda path: damage(path) or _non_finite(path))
    for problem in problems:
        log.warning("passed over: %s", problem)
    if good is None:
        raise NonFiniteError(f"no checkpoint in {output_dir} is whole with finite weights to go back to")
    return good


def _non_finite(checkpoint: Path) -> str | None:
    saved = [*(load_file(file).values() for file in checkpoint.glob("*.safetensors")), _optimizer_state(checkpoint)]
    return None if all(map(_are_finite, saved)) else "it holds non-finite values"


def _optimizer_state(checkpoint: Path) -> Iterator[torch.Tensor]:
    """Tensors of the optimizer's state, where it is a file of torch's (read without running code)."""
    if (checkpoint / OPTIMIZER_NAME).is_file():
        yield from _tensors(torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
