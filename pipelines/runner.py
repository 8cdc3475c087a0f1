"""The runner of a pipeline: starts jobs as processes, waits, repeats nothing that is finished, leaves nothing behind.

What is finished is read from the folders of the jobs, so that the same call goes on after a kill at any moment. A job's
fingerprint (configuration and inputs) is written to `jobs.json` before it starts. A folder whose fingerprint is another
one is set aside as `FOLDER.1`, ..., and the job done anew.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.errors import UserError
from core.locks import is_held, try_lock
from core.log import console, log
from core.process import WATCHED_PARENT
from pipelines.board import Board, Known
from pipelines.jobs import Job
from runs.files import free_name, write_whole
from runs.run_folder import LOCK_FILE, is_finished

JOBS_FILE, LOGS_FOLDER = "jobs.json", "logs"
TRAIN = (sys.executable, str(Path(__file__).resolve().parent.parent / "train.py"))
"""The command of a job, without its words."""
_INTERRUPTED = 130
_POLL_S = 0.2
_LAST_LINES = 20
_WAIT_FOR_A_DYING_JOB_S = 30.0


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    started_s: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_s


@dataclass
class PipelineRunner:
    """Runs `jobs` in their order, `jobs_at_once` side by side where their inputs allow it.

    Args:
        folder: that of the pipeline; it exists, and its lock is held.
        jobs: name -> job, inputs first.
        board: shows them.
    """

    folder: Path
    jobs: Mapping[str, Job]
    jobs_at_once: int
    board: Board
    command: Sequence[str] = TRAIN
    _running: list[Running] = field(default_factory=list)
    _num_signals: int = 0

    def __post_init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = read_known(self.folder)

    def run(self) -> int:
        """The exit status: 0 all are finished, 130 interrupted, otherwise that of the job that failed."""
        with _handled(self._on_signal):
            try:
                return self._run()
            finally:
                self._signal_all(signal.SIGKILL)  # none is left, unless this process fails itself
                for running in self._running:
                    running.process.wait()

    def _run(self) -> int:
        to_do = [job for job in self.jobs.values() if not is_done(job, self._known)]
        log.info("%d of %d jobs are finished already", len(self.jobs) - len(to_do), len(self.jobs))
        done = self.jobs.keys() - {job.name for job in to_do}
        failure = 0
        while to_do or self._running:
            if not failure and not self._num_signals:
                for job in self._startable(to_do, done):
                    to_do.remove(job)
                    self._start(job)
            elif not self._running:
                break
            time.sleep(_POLL_S)
            ended = [one for one in self._running if one.process.poll() is not None]
            for running in ended:
                self._running.remove(running)
                status = self._ended(running)
                if status == 0:
                    done = done | {running.job.name}
                elif not failure and not self._num_signals:
                    failure = status
                    self._signal_all(signal.SIGTERM)  # the others save what they have
            self.board.update(self._running, to_do, self._known)
            for running in ended:
                if running.job.name in done:
                    self.board.finished(running.job, self._known[running.job.name]["seconds"])
        if self._num_signals:
            log.warning("interrupted; the same command goes on with the jobs that are not finished")
            return _INTERRUPTED
        return failure

    def _startable(self, to_do: list[Job], done: Any) -> list[Job]:
        ready = [job for job in to_do if set(job.inputs) <= set(done)]
        return ready[: max(0, self.jobs_at_once - len(self._running))]

    def _start(self, job: Job) -> None:
        self._set_aside(job)
        _wait_for_lock(job.folder)
        self._known[job.name] = {**self._known.get(job.name, {}), "fingerprint": job.fingerprint}
        write_whole(self.folder / JOBS_FILE, json.dumps(self._known, indent=1) + "\n")
        log_file = self.log_file(job)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "ab") as output:
            # In a group of its own: the terminal's Ctrl-C comes to this process alone, and reaches the job once.
            process = subprocess.Popen(
                [*self.command, *job.words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={**os.environ, **self._threads(), WATCHED_PARENT: str(os.getpid())},
            )
        self._running.append(Running(job, process, time.monotonic()))
        self.board.started(job)

    def _set_aside(self, job: Job) -> None:
        """Keep what lies in the folder of a job and is that of another configuration or of other inputs."""
        if job.folder.exists() and self._known.get(job.name, {}).get("fingerprint") != job.fingerprint:
            job.folder.rename(kept := free_name(job.folder))
            log.info("%s: its configuration or an input changed; the earlier one is kept as %s", job.title, kept)

    def _threads(self) -> dict[str, str]:
        if self.jobs_at_once == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs_at_once))}

    def _ended(self, running: Running) -> int:
        """What a job ended with: 0 where it is finished."""
        job, status = running.job, running.process.returncode
        if status == 0 and not is_finished(job.folder):
            log.error("%s ended with status 0, and %s holds no summary.json of it", job.title, job.folder)
            status = 1
        if status == 0:
            self._known[job.name]["seconds"] = round(running.seconds, 1)
            write_whole(self.folder / JOBS_FILE, json.dumps(self._known, indent=1) + "\n")
        elif not self._num_signals:
            self._explain(job, status)
        return status if status in (0, 2, _INTERRUPTED) else 1

    def _explain(self, job: Job, status: int) -> None:
        text = self.log_file(job).read_text(encoding="utf-8", errors="replace")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        log.error("%s %s; the pipeline stops. Its last lines:", job.title, how)
        console.print("\n".join(text.splitlines()[-_LAST_LINES:]), markup=False, highlight=False, soft_wrap=True)
        log.error(
            "all of it: %s\nto go on: mend the cause, then the same command; finished jobs are not repeated, and jobs "
            "whose settings or inputs change are done anew",
            self.log_file(job),
        )

    def log_file(self, job: Job) -> Path:
        """What a job writes to its console."""
        return self.folder / LOGS_FOLDER / f"{job.name}.log"

    def _on_signal(self, *_: Any) -> None:
        """The first one is passed on, and jobs save and end; the second one ends them at once."""
        self._num_signals += 1
        self._signal_all(signal.SIGTERM if self._num_signals == 1 else signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(number)


def is_done(job: Job, known: Known) -> bool:
    """Whether a job is finished, with this configuration and these inputs."""
    is_this = known.get(job.name, {}).get("fingerprint") == job.fingerprint
    return is_this and job.folder.is_dir() and is_finished(job.folder)


def read_known(folder: Path) -> dict[str, dict[str, Any]]:
    """What `jobs.json` in a pipeline's folder says: job -> fingerprint, and the seconds of a finished one.

    Raises:
        UserError: it is damaged.
    """
    file = folder / JOBS_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(
            f"{file} is damaged",
            expected="what the pipeline wrote",
            remedy="delete it: every job is then done anew, and the earlier folders are kept beside as FOLDER.1",
        )
    return known


@contextmanager
def pipeline_lock(folder: Path) -> Iterator[IO[str]]:
    """
    Raises:
        UserError: another process runs a pipeline in this folder.
    """
    lock = try_lock(folder / LOCK_FILE)
    if lock is None:
        raise UserError(
            f"another process runs a pipeline in {folder}",
            expected="one for each output folder",
            remedy="wait for it, or set output_dir=ANOTHER_FOLDER",
        )
    with lock:
        yield lock


def _wait_for_lock(folder: Path) -> None:
    """Wait for a job of a runner that was killed: it ends by itself, a moment later."""
    end = time.monotonic() + _WAIT_FOR_A_DYING_JOB_S
    while is_held(folder / LOCK_FILE) and time.monotonic() < end:
        time.sleep(_POLL_S)


@contextmanager
def _handled(on_signal: Any) -> Iterator[None]:
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: before for number, before in handled.items() if before is not signal.SIG_IGN}  # as nohup does
    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, before in handled.items():
            signal.signal(number, before)
