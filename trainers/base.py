"""RunTrainer: the shared base of the trainers. Signals, recovery, offload, checkpoints, meter, finish and model card.

What a step does is not hidden here: a trainer's `training_step` enters `self.offloaded()` and calls `self.guarded(...)`
and `self.retries(...)` itself.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from core.errors import NonFiniteError, UserError
from core.log import log
from core.types import Phase
from core.units import gb
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from optimization.memory_optim import CheckpointOffload
from planner.plan import MemoryPlan
from runs.checkpoints import publish_checkpoint, rotate_checkpoints, set_aside_newer
from runs.metrics import METRICS_FILE, is_evaluated
from runs.run_folder import STAGING_FOLDER
from schemas.any_run import TrainingRunConfig
from trainers.callbacks import StopOnSignal
from trainers.memory_limits import load_limits, save_limits
from trainers.recovery import Recovery, RollBackError, last_good_checkpoint, scale_rate

_NO_SCHEDULE = ("reduce_lr_on_plateau", "greedy")
"""`lr_scheduler_type`s that set the rate from the results instead of a base rate."""


class RunTrainer(Trainer, ABC):
    """Shared base of the trainers of a run; named before the library's trainer: `class T(RunTrainer, GRPOTrainer)`.

    Args:
        config: the run.
        plan: the memory plan that the run is held to; logged beside what is measured.
        meter: seconds and peak memory of the run's phases.
        retries: repeats what ran out of memory, with less at once.
        library: arguments of the library's trainer.
    """

    recovery: Recovery | None = None
    _staging_dir: str | None = None

    def __init__(
        self,
        *,
        config: TrainingRunConfig,
        plan: MemoryPlan,
        meter: PhaseMeter,
        retries: MemoryRetries,
        callbacks: Sequence[TrainerCallback] = (),
        **library: Any,
    ) -> None:
        self.config, self.plan, self.meter, self.retries = config, plan, meter, retries
        self._evaluated_step = -1
        self._num_tokens = dict.fromkeys(Phase, 0)
        self._reported_use = meter.checkpoint_use()
        super().__init__(callbacks=list(callbacks), **library)
        if self.args.optim in ("lomo", "adalomo"):
            retries.never_repeated.add(Phase.TRAIN)  # they step within backward
        self.remove_callback(PrinterCallback)
        self._stop = StopOnSignal(may_save=lambda: self.recovery is None or self.recovery.cause is None)
        self.add_callback(self._stop)  # before the recovery, which forgets the cause at the end of the step
        if config.recover_from_nan:
            self.start_recovery(max_recoveries=config.max_recoveries, lr_backoff=config.lr_backoff)

    # The run: signals, roll-backs, the last evaluation

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; a roll-back starts the loop again from the last good checkpoint.

        Raises:
            UserError: a file of the checkpoint wants to run code as it is read; none of it ran.
            KeyboardInterrupt: a signal stopped it; the message says where it goes on from.
        """
        output_dir = Path(self.args.output_dir)
        with self.meter.phase(Phase.TRAIN), self._stop.handling(output_dir, self.config.resume):
            if resume_from_checkpoint is not None:
                load_limits(Path(resume_from_checkpoint), self.retries)
            while True:
                try:
                    return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                except RollBackError:
                    good = last_good_checkpoint(output_dir)
                    set_aside_newer(good)
                    resume_from_checkpoint = str(good)
                    log.warning("going back to %s", good)
                    self.optimizer = self.lr_scheduler = None
                    self.args.eval_on_start = False
                    self._forget_unfinished_step()
                except UnpicklingError as error:  # of torch.load(weights_only=True)
                    raise UserError(
                        f"{resume_from_checkpoint} holds more than tensors and numbers",
                        expected="a checkpoint as training writes it",
                        remedy="go on from another one: resume=CHECKPOINT",
                    ) from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of `held_out_metrics`, logged."""
        found = self.held_out_metrics(eval_dataset or self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._evaluated_step = self.state.global_step
        Trainer.log(self, dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @abstractmethod
    def held_out_metrics(self, dataset: Any) -> dict[str, float]:
        """Metrics of an evaluation on the held-out rows."""

    def finish(self) -> None:
        """Evaluate once more if the last step was not, and write the result with tokenizer and model card.

        A run may have been killed before it had deleted what its last checkpoint makes superfluous: that is done here.
        """
        step, metrics = self.state.global_step, Path(self.args.output_dir, METRICS_FILE)
        if self.args.eval_strategy != "no" and self._evaluated_step != step and not is_evaluated(metrics, step):
            self.evaluate()
        self.save_model()
        rotate_checkpoints(Path(self.args.output_dir), self.args.save_total_limit)

    @cached_property
    def offload(self) -> Callable[[], AbstractContextManager[Any]]:
        """What `offloaded` enters. Made at the first step, when the parameters that it must leave alone lie where they
        stay, and anew after an error, which leaves it with tensors of a backward that never came."""
        asked_for = self.config.offload_checkpoints and self.args.gradient_checkpointing
        return CheckpointOffload(self.model) if asked_for and self.meter.device.type == "cuda" else nullcontext

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Around forward and backward: what gradient checkpointing keeps goes to host memory, where the run asks so."""
        try:
            with self.offload():
                yield
        except Exception:
            self.__dict__.pop("offload", None)
            raise

    # Recovery from non-finite values (trainers/recovery.py)

    def start_recovery(self, *, max_recoveries: int, lr_backoff: float) -> None:
        """Watch the steps for non-finite values, and recover from them.

        Raises:
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
        """Called once per step, after clipping and right before the optimizer; a bad step has no gradients after it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.recovery is None or (self.recovery.check("the gradient norm", grad_norm) and not self.recovery.cause):
            return grad_norm
        model.zero_grad(set_to_none=True)
        return 0.0

    def _pass_over_micro_batch(self) -> None:
        """Count a micro-batch that is not computed, where a trainer keeps such a count."""

    def _forget_unfinished_step(self) -> None:
        """Drop what a trainer keeps from micro-batch to micro-batch, before the loop starts again."""

    # Time and memory

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            logs |= self._phase_metrics()
        super().log(logs, start_time)

    def _phase_metrics(self) -> dict[str, float]:
        """Seconds of each phase since the last log, peak memory so far beside the plan's, and tokens/s of that time.

        Tokens are those of completions (TRAIN: that the loss is of); an evaluation counts in time and tokens alike.
        On a GPU the measured memory is what torch reserved, a sleeping vLLM left out, and beside it what the driver
        reports as used. On a CPU it is this process's resident set (`rss`), and the plan's stays that of a GPU.
        """
        use, before = self.meter.checkpoint_use(), self._reported_use
        self._reported_use = use
        seconds = {phase: use[phase].seconds - before[phase].seconds for phase in use}
        metrics = {f"time/{phase}_s": seconds[phase] for phase in use if seconds[phase] > 0}
        kind = "reserved" if self.meter.device.type == "cuda" else "rss"
        for phase in (p for p in use if use[p].peak_reserved_bytes):
            metrics[f"memory/{phase}_{kind}_gb"] = gb(use[phase].peak_reserved_bytes)
            metrics[f"memory/{phase}_predicted_gb"] = gb(self.plan.peak_bytes(phase))
            if use[phase].peak_driver_bytes:
                metrics[f"memory/{phase}_driver_gb"] = gb(use[phase].peak_driver_bytes)
        for phase, num_tokens in self._num_tokens.items():
            if num_tokens and seconds[phase] > 0:
                metrics[f"tokens_per_s/{phase}"] = num_tokens / seconds[phase]
            self._num_tokens[phase] = 0
        return metrics | {f"memory/{phase}_oom_retries": num for phase, num in self.retries.num_retries.items()}

    # Atomic checkpoints: a folder `checkpoint-N` is complete or absent

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a staging folder, then publish it."""
        output_dir = Path(self.args.output_dir)
        staging = output_dir / STAGING_FOLDER
        shutil.rmtree(staging, ignore_errors=True)
        self._staging_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            save_limits(staging / f"checkpoint-{self.state.global_step}", self.retries)
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)  # of a full disk, which has room again for what comes last
            raise
        finally:
            self._staging_dir = None
        name = f"checkpoint-{self.state.global_step}"
        publish_checkpoint(staging / name, output_dir / name)
        staging.rmdir()
        rotate_checkpoints(output_dir, self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but for a `learning_rate` that was set anew; the recovery keeps the lower of the two itself."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.recovery is not None or self.args.lr_scheduler_type in _NO_SCHEDULE:
            return
        schedule: Any = self.lr_scheduler
        if (saved := schedule.base_lrs[0]) not in (0, self.args.learning_rate):
            scale_rate(self.optimizer, schedule, self.args.learning_rate / saved)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint of the last step is resumed from: transformers would train one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # The model card, beside every model that is saved

    @abstractmethod
    def model_card(self) -> str:
        """README.md of the result and of each checkpoint."""

    def files_beside_model(self) -> dict[str, str]:
        """More files that the card speaks of: name -> text."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle nobody reads
        for name, text in {"README.md": self.model_card(), **self.files_beside_model()}.items():
            Path(output_dir or self.args.output_dir, name).write_text(text, encoding="utf-8")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The libraries' own, called at checkpoints and uploads; ours lies beside the weights by then."""
