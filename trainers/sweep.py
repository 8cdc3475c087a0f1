"""The jobs of a sweep, each in a process of its own."""

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from core.log import log
from planner.fit import resolve_auto
from schemas.run import load_run_config

_INTERRUPTED = 130
_MILDEST_FIRST = (0, 2, 1)
"""Done, could not start, failed."""


def run_jobs(command: Sequence[str], jobs: Sequence[Mapping[str, Any]]) -> int:
    """Run `command` once for each job, one after the other; it reads the job's composed values from its stdin as JSON.

    A GPU is then as empty for the second job as it was for the first: what a library leaves on the GPU, or broken in
    CUDA, ends with its process. A job that fails does not stop the others; Ctrl-C and SIGTERM reach the job at work,
    which saves and ends, and no further one starts.

    Raises:
        ConfigError: a job is not valid; none was started. The GPU is not touched for it: it is the jobs' own.

    Returns:
        The worst exit status of the jobs: 1 over 2 over 0; 130 where the sweep was interrupted.
    """
    for values in jobs:
        load_run_config(resolve_auto(values, None))
    sweep = _Sweep(command)
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: before for number, before in handled.items() if before is not signal.SIG_IGN}  # as nohup does
    for number in handled:
        signal.signal(number, sweep.pass_on)
    try:
        statuses = []
        for index, values in enumerate(jobs, start=1):
            log.info("job %d of %d: %s", index, len(jobs), values["output_dir"])
            status = sweep.run(json.dumps(values))
            if sweep.is_interrupted or status == _INTERRUPTED:
                log.warning("the sweep ends here: %d of %d jobs were not started", len(jobs) - index, len(jobs))
                return _INTERRUPTED
            statuses.append(status if status in _MILDEST_FIRST else 1)
    finally:
        for number, before in handled.items():
            signal.signal(number, before)
    return max(statuses, key=_MILDEST_FIRST.index)


class _Sweep:
    def __init__(self, command: Sequence[str]) -> None:
        self.is_interrupted = False
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    def run(self, stdin: str) -> int:
        # In a group of its own: the terminal's Ctrl-C comes to this process alone, and reaches the job once.
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True, process_group=0)
        if self.is_interrupted:  # while it was being started
            self._process.terminate()
        self._process.communicate(stdin)
        return self._process.returncode

    def pass_on(self, number: int, *_: Any) -> None:
        self.is_interrupted = True
        if self._process is not None:
            self._process.send_signal(number)
