"""Past a non-finite loss, gradient or reward: skip the step, then lower the learning rate, then roll back, then stop.

A bad step changes nothing: its gradients are dropped before the optimizer sees them. The second bad step in a row also
multiplies the learning rate by `lr_backoff`; the third lowers it again and goes back to the last good checkpoint
(adapters, optimizer, schedule, random generators, place in the data; the generator gets the restored adapter).
Counts are those of this process; the lowered rate is saved with the checkpoints.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from core.errors import NonFiniteError, UserError
from core.log import log

_STEPS_UNTIL_LOWER, _STEPS_UNTIL_ROLL_BACK = 2, 3
_NO_SCHEDULE = ("reduce_lr_on_plateau", "greedy")
"""`lr_scheduler_type`s that set the rate from the results instead of a base rate."""


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
        RollBackError: from the end of the third bad step in a row.
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
        _scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self._lr_scale / loaded_scale)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first step has something to go back to as well."""
        if state.global_step == 0 and get_last_checkpoint(str(args.output_dir)) is None:
            self._save()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.cause is None:
            self._num_in_a_row = 0
            return
        cause, self.cause = self.cause, None
        self._num_in_a_row += 1
        self.num_bad_steps += 1
        control.should_save = False  # a checkpoint of a good step is what there is to go back to
        if self.num_bad_steps > self.max_recoveries:
            self._tell("stop", cause, state, control)
            raise NonFiniteError(
                f"step {state.global_step}: {cause}; {self.max_recoveries} bad steps were forgiven (max_recoveries) "
                f"with {self.num_roll_backs} roll-backs, at the end at {self._lr_scale:g} of the learning rate. "
                f"The checkpoints in {args.output_dir} are good: go on from one with a lower learning_rate."
            )
        if self._num_in_a_row >= _STEPS_UNTIL_LOWER:
            self._lr_scale *= self.lr_backoff
            _scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.lr_backoff)
        if self._num_in_a_row >= _STEPS_UNTIL_ROLL_BACK:
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


def _scale_rate(optimizer: Any, lr_scheduler: Any, factor: float) -> None:
    """Multiply the learning rate from now on, whatever the schedule: its base and what is set for the next step."""
    lr_scheduler.base_lrs = [base * factor for base in lr_scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the trainer logs


def last_good_checkpoint(output_dir: str) -> Path:
    """The newest checkpoint whose adapter has only finite values.

    Raises:
        NonFiniteError: there is none.
    """
    steps = {int(path.name.rpartition("-")[2]): path for path in Path(output_dir).glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        adapter = load_file(path / "adapter_model.safetensors")
        if all(tensor.isfinite().all() for tensor in adapter.values()):
            return path
        log.warning("%s holds non-finite values and is passed over", path)
    raise NonFiniteError(f"no checkpoint in {output_dir} has a finite adapter to go back to")


class RecoveryMixin(Trainer):
    """The hooks of `Recovery`: a first base class, before the trainer that it extends. Off until it is started."""

    recovery: Recovery | None = None

    def start_recovery(self, *, max_recoveries: int, lr_backoff: float) -> None:
        """Raises:
        UserError: several processes, of which one alone would see a bad loss, or a rate that is not a schedule's.
        """
        if self.args.world_size > 1 or self.args.learning_rate == 0 or self.args.lr_scheduler_type in _NO_SCHEDULE:
            raise UserError(
                f"recover_from_nan=true with {self.args.world_size} processes, learning_rate="
                f"{self.args.learning_rate:g}, lr_scheduler_type={self.args.lr_scheduler_type}",
                expected="one process, and a learning rate above 0 that follows a schedule",
                remedy="set recover_from_nan=false, or lr_scheduler_type=constant on one GPU",
            )
        self.recovery = Recovery(
            max_recoveries=max_recoveries,
            lr_backoff=lr_backoff,
            report=lambda logs: Trainer.log(self, logs),
            save=lambda: self._save_checkpoint(self.model, trial=None),
        )
        self.add_callback(self.recovery)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; a roll-back starts the loop again from the last good checkpoint."""
        while True:
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except RollBackError:
                resume_from_checkpoint = str(last_good_checkpoint(self.args.output_dir))
                log.warning("going back to %s", resume_from_checkpoint)
                self.optimizer = self.lr_scheduler = None
                self.args.eval_on_start = False
                self._forget_unfinished_step()

    def guarded(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The loss of `step`, which computes gradients; 0 where the step at work is a bad one."""
        if self.recovery is None:
            return step()
        if self.recovery.cause is None:
            try:
                loss = step()
            except NonFiniteError as error:
                self.recovery.cause = str(error)
            else:
                return loss if self.recovery.check("the loss", loss) else torch.zeros_like(loss)
        self._pass_over_micro_batch()
        return torch.zeros((), device=self.args.device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, after clipping and right before the optimizer; a bad step has no gradients after it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.recovery is None or (self.recovery.check("the gradient norm", grad_norm) and not self.recovery.cause):
            return grad_norm
        model.zero_grad(set_to_none=True)
        return 0.0

    def _pass_over_micro_batch(self) -> None:
        """Count a micro-batch that is not computed, where a trainer keeps such a count."""

    def _forget_unfinished_step(self) -> None:
        """Drop what a trainer keeps from micro-batch to micro-batch, before the loop starts again."""
