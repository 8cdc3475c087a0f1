"""Trainer callbacks: metrics file, progress on the console, reference that follows, Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.log import can_animate, console, log
from core.units import format_duration
from models.host import REFERENCE_ADAPTER
from models.meter import PhaseMeter
from planner.watchdog import GrowthWatchdog
from runs.metrics import append_metrics
from trainers.memory_line import MemoryLine
from trainers.stops import goes_on_from


class MetricsFile(TrainerCallback):
    """Appends every logged dictionary to the metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        append_metrics(self.path, state.global_step, logs)


class SyncReferenceAdapter(TrainerCallback):
    """Every `every_steps` optimizer steps: reference <- alpha * policy + (1 - alpha) * reference.

    The mean is taken of the LoRA factors A and B, not of their product: with the published alpha of 0.9 the reference
    is almost a copy, and with alpha 1 it is one exactly (TR-DPO, arXiv 2404.09656, applied to an adapter).
    """

    def __init__(self, *, alpha: float, every_steps: int) -> None:
        self.alpha, self.every_steps = alpha, every_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        if state.global_step % self.every_steps == 0:
            mix_into_reference(model, self.alpha)


def mix_into_reference(model: PeftModel, alpha: float) -> None:
    parameters = dict(model.named_parameters())
    for name, reference in parameters.items():
        if f".{REFERENCE_ADAPTER}." in name:
            policy = parameters[name.replace(f".{REFERENCE_ADAPTER}.", ".default.")]
            reference.data.lerp_(policy.data, alpha)


class MemoryWatch(TrainerCallback):
    """Feeds each step's peak to the growth watchdog and passes its warning on."""

    def __init__(self, meter: PhaseMeter, *, limit_bytes: int, max_warnings: int) -> None:
        self.meter = meter
        self._new_watchdog = partial(GrowthWatchdog, limit_bytes=limit_bytes, max_warnings=max_warnings)
        self._watchdog: GrowthWatchdog | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a roll-back steps are counted anew."""
        self._watchdog = self._new_watchdog(max_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._watchdog is not None
        peak = self.meter.take_recent_peak()
        found = self._watchdog.observe(
            state.global_step, allocated_bytes=peak.peak_allocated_bytes, reserved_bytes=peak.peak_reserved_bytes
        )
        if found is not None:
            log.warning("%s", found.message)


TEACHER_SHOWN = (
    ("reward", "reward"),
    ("rlt/answer_log_prob_mean", "solution"),
    ("rlt/reasoning_kl_mean", "kl"),
    ("rlt/format_rate", "format"),
    ("completions/mean_length", "tokens"),
)
DIFFUSION_SHOWN = (("loss", "loss"), ("grad_norm", "gradient norm"))
SFT_SHOWN = (("loss", "loss"), ("mean_token_accuracy", "accuracy"), ("grad_norm", "gradient norm"))


class _BarsAndMemory(Progress):
    """Progress bars over a line on memory."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        self.memory = ""
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.memory, style="dim")


class ConsoleProgress(TrainerCallback):
    """A bar for the run, one for the phase at work, the memory in use, and one line for each logged step, with the
    time that is left."""

    def __init__(self, shown: Sequence[tuple[str, str]], memory: MemoryLine) -> None:
        self._shown, self._memory = shown, memory
        self._progress = _BarsAndMemory(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not can_animate(),
        )
        self._run: TaskID | None = None
        self._phase: TaskID | None = None
        self._first_step, self._start_s = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step, self._start_s = state.global_step, time.perf_counter()
        for task in self._progress.task_ids:  # training starts again after a roll-back
            self._progress.remove_task(task)
        self._run = self._progress.add_task("steps", total=state.max_steps, completed=state.global_step, note="")
        self._phase = self._progress.add_task("", total=None, visible=False, note="")
        self._show_memory()
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._run is not None:
            self._progress.update(self._run, completed=state.global_step, note=f"{self._time_left(state)} left")
            self._show_memory()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self._shown[0][0] in logs:
            shown = "  ".join(f"{label} {logs[key]:.2f}" for key, label in self._shown if logs.get(key) is not None)
            shown += f"  {self._memory.short()}"
            log.info("step %d/%d  %s  %s left", state.global_step, state.max_steps, shown, self._time_left(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def phase(self, description: str, done: int, total: int) -> None:
        """Show how far the phase at work is; hidden once it is done."""
        if self._phase is not None:
            self._progress.update(
                self._phase, description=description, completed=done, total=total, visible=done < total
            )
            self._show_memory()

    def _show_memory(self) -> None:
        """Asked here and not by the thread that draws: beside CUDA's work the device is asked by one thread alone."""
        self._progress.memory = self._memory.live()

    def close(self) -> None:
        self._progress.stop()

    def _time_left(self, state: TrainerState) -> str:
        steps_done = state.global_step - self._first_step
        if steps_done == 0:
            return "?"
        seconds_per_step = (time.perf_counter() - self._start_s) / steps_done
        return format_duration(seconds_per_step * (state.max_steps - state.global_step))


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignal(TrainerCallback):
    """SIGINT (Ctrl-C), SIGTERM or SIGHUP: finish the step at work, save it, stop. A second one stops at once.

    A second SIGHUP does not: a terminal that is closed sends it to the run and to what started it, and is then found
    gone by the next line that is printed.

    Args:
        may_save: whether the step that ended may be a checkpoint; where it may not, the next one is waited for.
    """

    def __init__(self, may_save: Callable[[], bool]) -> None:
        self._may_save = may_save
        self._step = 0
        self._is_good = False
        self.is_asked = False

    @contextmanager
    def handling(self, output_dir: Path, resume: str) -> Iterator[None]:
        """Handle the signals while a run trains in `output_dir`; only the main thread can.

        Raises:
            KeyboardInterrupt: training was stopped; says where it goes on from.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _STOPPING if is_main}
        handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # as nohup and & do
        for number in handled:
            signal.signal(number, self._ask)
        self.is_asked = False
        try:
            yield
            if self.is_asked:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise KeyboardInterrupt(goes_on_from(output_dir, resume)) from None
        finally:
            for number in handled:
                signal.signal(number, before[number])

    def _ask(self, number: int, *_: Any) -> None:
        if self.is_asked:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self.is_asked = True
        log.warning("finishing step %d, then saving; press again to stop now", self._step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step, self._is_good = state.global_step + 1, False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._is_good = self._may_save()
        self._stop_if_asked(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_asked(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= self.is_asked

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_asked and state.global_step >= state.max_steps:
            self.is_asked = False
            log.info("that was the last step: the run ends as usual; press again to leave that out")

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if self.is_asked and self._is_good:
            control.should_log = control.should_save = control.should_training_stop = True
