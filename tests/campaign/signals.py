"""Signals at random moments: TERM, INT, INT twice, HUP, USR1, STOP and CONT, and a console that is closed (PIPE)."""

import os
import signal
import time

from tests.campaign.lab import Lab, Program, Trial
from tests.campaign.process import Process
from tests.campaign.tally import Tally

_STATUS = {
    "TERM": (130, -signal.SIGTERM),  # before training it ends the process, as any other
    "INT": (130,),
    "INT twice": (130,),
    "HUP": (130, -signal.SIGHUP),
    "USR1": (-signal.SIGUSR1,),
    "STOP and CONT": (),
    "PIPE": (1,),
}
"""What each may end a run with, besides 0 where it came in the last step."""


def signal_and_continue(lab: Lab, tally: Tally, program: Program, num_signals: int) -> None:
    rng = lab.random(f"signals {program.name}")
    seconds = lab.reference(program).seconds
    kinds = [list(_STATUS)[i % len(_STATUS)] for i in range(num_signals)]
    cases = [(kind, rng.uniform(0.15, 1.0) * seconds) for kind in kinds]
    lab.each(cases, lambda case: _try(lab, tally, program, *case))


def _try(lab: Lab, tally: Tally, program: Program, kind: str, after_s: float) -> None:
    trial = lab.trial(program)
    process = _start(trial, kind)
    process.wait(after_s)
    sent = _send(process, kind)
    ended = process.end()
    if not sent:
        return trial.remove()
    problems = []
    if ended.status not in (0, *_STATUS[kind]):
        problems.append(f"status {ended.status} and not {_STATUS[kind]}:\n{ended.last_lines}")
    if ended.num_tracebacks:
        problems.append(f"a traceback:\n{ended.last_lines}")
    problems += trial.differences() if ended.status == 0 else trial.continued()
    tally.count(f"{program.name}, {trial.folder}, {kind} after {after_s:.2f} s", problems)
    if not problems:
        trial.remove()


def _start(trial: Trial, kind: str) -> Process:
    """The run; for PIPE by the command line, its output in a pipe that nobody reads any more (`| head`)."""
    if kind != "PIPE":
        return trial.start()
    reading, writing = os.pipe()
    process = trial.lab.starter.command(trial.call(), stdout=writing)
    os.close(writing)
    os.close(reading)
    return process


def _send(process: Process, kind: str) -> bool:
    if kind == "PIPE":
        return True
    first, *more = kind.replace("INT twice", "INT and INT").split(" and ")
    sent = process.send(signal.Signals[f"SIG{first}"])
    for name in more:
        time.sleep(0.3)
        process.send(signal.Signals[f"SIG{name}"])
    return sent
