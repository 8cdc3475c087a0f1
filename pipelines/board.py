"""The board of a pipeline: one line for each job at work, with its progress and the time that is left."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from core.log import can_animate, console, log
from core.units import format_duration
from pipelines.jobs import Job
from runs.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from pipelines.runner import Running

_READ_EVERY_S = 2.0

Known = Mapping[str, Mapping[str, Any]]
"""What `jobs.json` holds: job -> its fingerprint, and the seconds that it took."""


class Board:
    """Lines that move on a terminal; elsewhere one line when a job starts and one when it is finished.

    Args:
        num_jobs: all of the pipeline, finished ones included.
        jobs_at_once: how many run side by side.
        expected_s: stage -> seconds that one of its jobs is expected to take, None where nobody said.
    """

    def __init__(self, num_jobs: int, jobs_at_once: int, expected_s: Mapping[str, float | None]) -> None:
        self._num_jobs, self._jobs_at_once, self._expected_s = num_jobs, jobs_at_once, expected_s
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not can_animate())
        self._all = self._progress.add_task("pipeline", total=num_jobs, state="")
        self._tasks: dict[str, TaskID] = {}
        self._read_at: dict[str, float] = {}
        self._left, self._num_done = "", 0

    def __enter__(self) -> "Board":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        self._tasks[job.name] = self._progress.add_task(f"  {job.title}", total=1.0, state="")
        if not console.is_terminal:
            log.info("%s: started", job.title)

    def finished(self, job: Job, seconds: float) -> None:
        left = (
            f"{self._num_done} of {self._num_jobs} jobs; {self._left}"
            if self._num_done < self._num_jobs
            else "the last"
        )
        log.info("%s: finished in %s (%s)", job.title, format_duration(seconds), left)

    def update(self, running: "Sequence[Running]", to_do: Sequence[Job], known: Known) -> None:
        """Show where the jobs are."""
        self._left = time_left(
            [(one.job, one.seconds) for one in running], to_do, known, self._jobs_at_once, self._expected_s
        )
        self._num_done = self._num_jobs - len(running) - len(to_do)
        state = f"{self._num_done} of {self._num_jobs} jobs finished, {self._left}"
        self._progress.update(self._all, completed=self._num_done, state=state)
        at_work = {one.job.name for one in running}
        for name in self._tasks.keys() - at_work:
            self._progress.remove_task(self._tasks.pop(name))
        for one in running:
            if one.seconds - self._read_at.get(one.job.name, -_READ_EVERY_S) >= _READ_EVERY_S:
                self._read_at[one.job.name] = one.seconds
                step, last = steps_of(one.job)
                state = f"step {step} of {last}" if last else ""
                self._progress.update(
                    self._tasks[one.job.name], total=last or None, completed=step if last else 0, state=state
                )


def steps_of(job: Job) -> tuple[int, int | None]:
    """The last step that a job has logged, and that with which it ends; None: it does not train for a known number."""
    file, last = job.folder / METRICS_FILE, job.values.get("max_steps")
    step = max((line["step"] for line in read_metrics(file)), default=0) if file.exists() else 0
    return step, last if isinstance(last, int) and last > 0 else None


def time_left(
    running: Sequence[tuple[Job, float]],
    to_do: Sequence[Job],
    known: Known,
    jobs_at_once: int,
    expected_s: Mapping[str, float | None],
) -> str:
    """How long the rest takes, in words: by the jobs of each stage that have finished, else by what is expected.

    `running`: jobs at work, with the seconds since they started.
    """
    by_stage: dict[str, list[float]] = {}
    for name, found in known.items():
        if "seconds" in found:
            by_stage.setdefault(name.split("/")[0], []).append(found["seconds"])
    left_s, unknown = 0.0, set()
    for job, spent_s in [*running, *((job, 0.0) for job in to_do)]:
        times = by_stage.get(job.stage)
        seconds = sum(times) / len(times) if times else expected_s.get(job.stage)
        if seconds is None:
            unknown.add(job.stage)
        else:
            left_s += max(seconds - spent_s, 0.0)
    known_part = f"about {format_duration(left_s / jobs_at_once)}" if left_s or not unknown else ""
    unknown_part = f"{', '.join(sorted(unknown))} (time not known)" if unknown else ""
    return " and ".join(filter(None, [known_part, unknown_part])) + " left"
