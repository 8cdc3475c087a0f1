"""`kill -9` at random moments, before each change of a file, and at aimed moments; then the same command."""

import random
import signal

from tests.campaign.faults import FILES, Fault
from tests.campaign.lab import Lab, Program, Trial
from tests.campaign.tally import Tally

_MAX_KILLS = 3


def kill_and_continue(lab: Lab, tally: Tally, program: Program, num_kills: int) -> None:
    """Runs that are killed up to three times each, and then let through."""
    rng = lab.random(f"kills {program.name}")
    lab.reference(program)
    seeds = [rng.random() for _ in range(-(-num_kills // 2))]
    lab.each(seeds, lambda seed: _chain(lab, tally, program, random.Random(seed)))


def _chain(lab: Lab, tally: Tally, program: Program, rng: random.Random) -> None:
    trial = lab.trial(program)
    kills: list[str] = []
    for _ in range(rng.randint(1, _MAX_KILLS)):
        killed = _kill(trial, rng)
        if killed is None:
            break
        kills.append(killed)
    if not kills:
        return trial.remove()
    problems = trial.continued()
    tally.count(f"{program.name}, {trial.folder}, {', then '.join(kills)}", problems, tried=len(kills))
    if not problems:
        trial.remove()


def _kill(trial: Trial, rng: random.Random) -> str | None:
    """Start the run and kill it; None where it ended before that."""
    reference = trial.lab.reference(trial.program)
    kind = rng.choice(("moment", "files", "point"))
    if kind == "moment":
        seconds = rng.uniform(0.0, reference.seconds)
        process = trial.start()
        process.wait(seconds)
        process.send(signal.SIGKILL)
        return f"kill after {seconds:.2f} s" if process.end().status == -signal.SIGKILL else None
    point = FILES if kind == "files" else rng.choice(trial.program.points)
    fault = Fault(point, rng.randint(1, reference.counts[point]), after=point != FILES and rng.random() < 0.5)
    return str(fault) if trial.end(faults=[fault]).status == -signal.SIGKILL else None
