"""Odd surroundings, by the real command line: what a run finds in the environment and where its folder lies."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from schemas.compose import setting_words
from tests.campaign.disk_full import mount_obstacle
from tests.campaign.faults import Fault
from tests.campaign.lab import RUN, Lab, Program, Trial, differences
from tests.campaign.process import Ended
from tests.campaign.tally import Tally

_STEP = "accelerate.optimizer:AcceleratedOptimizer.step"


@dataclass(frozen=True)
class Surroundings:
    """`{read_only}` in a value is a folder that nobody can write to, `{trial}` the trial's."""

    name: str
    environment: Mapping[str, str | None] = field(default_factory=dict)
    output_dir: str = RUN
    shell: str = 'exec "$@"'
    """What a shell does with the command."""
    fault: Fault | None = None


SURROUNDINGS = (
    Surroundings("no HOME", {"HOME": None}),
    Surroundings("a HOME that is not there", {"HOME": "/nowhere/home"}),
    Surroundings("a read-only HOME and cache", {"HOME": "{read_only}", "HF_HOME": "{read_only}/hf"}),
    Surroundings("a TMPDIR that is not there", {"TMPDIR": "/nowhere/tmp"}),
    Surroundings("a TMPDIR with spaces", {"TMPDIR": "{trial}/tmp dir"}),
    Surroundings("the C locale", {"LANG": None, "LC_ALL": "C"}),
    Surroundings("an ASCII console", {"PYTHONIOENCODING": "ascii"}, output_dir="ラン-é-🎓"),
    Surroundings("a dumb terminal", {"TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1"}),
    Surroundings("stdin closed", shell='exec "$@" 0<&-'),
    Surroundings("stdin, stdout and stderr closed", shell='exec "$@" 0<&- 1>&- 2>&-'),
    Surroundings("umask 077", shell='umask 077; exec "$@"'),
    Surroundings("few handles", shell='ulimit -n 128; exec "$@"'),
    Surroundings("a terminal", shell='script -qec "$(printf "%q " "$@")" /dev/null'),
    Surroundings("nohup", shell='nohup "$@"'),
    Surroundings("a folder with spaces and quotes", output_dir="my 'first' run, \"quoted\""),
    Surroundings("a folder in other scripts", output_dir="ラン-é-🎓"),
    Surroundings("a folder with brackets and markup", output_dir="[bold]run[/] {a} %s"),
    Surroundings("a folder with a newline", output_dir="two\nlines"),
    Surroundings("a folder deep down", output_dir="/".join(["deeper"] * 20)),
    Surroundings("a folder by a link", output_dir="link/run", shell='mkdir real; ln -s real link; exec "$@"'),
    Surroundings("a folder that is a link", output_dir="link", shell='mkdir real; ln -s real link; exec "$@"'),
    Surroundings("a clock that goes back a day", fault=Fault(_STEP, 2, action="clock:-86400")),
    Surroundings("a clock that jumps ahead a year", fault=Fault(_STEP, 2, action="clock:31536000")),
)


def run_in_each(lab: Lab, tally: Tally, program: Program, num_surroundings: int) -> None:
    """Each run ends as in plain surroundings."""
    rng = lab.random("surroundings")
    lab.reference(program)
    read_only = _read_only_folder(lab.base)
    chosen = rng.sample(SURROUNDINGS, min(num_surroundings, len(SURROUNDINGS)))
    usable = [s for s in chosen if read_only or "{read_only}" not in str(s.environment)]
    try:
        lab.each(usable, lambda surroundings: _try(lab, tally, program, surroundings, read_only))
    finally:
        if read_only:
            subprocess.run(["umount", "-l", read_only], check=False)


def _read_only_folder(base: Path) -> str:
    """A mount that root cannot write to either; empty where none can be made."""
    if mount_obstacle(base):
        return ""
    folder = base / "read-only"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=True)
    return str(folder)


def _start(trial: Trial, surroundings: Surroundings, read_only: str) -> Ended:
    values = {k: v and v.format(read_only=read_only, trial=trial.folder) for k, v in surroundings.environment.items()}
    call = trial.call(*setting_words({"output_dir": surroundings.output_dir}), environment=values)
    if surroundings.fault is not None:
        return trial.end(faults=[surroundings.fault])
    return trial.lab.starter.command(call, "bash", "-c", surroundings.shell, "bash").end()


def _try(lab: Lab, tally: Tally, program: Program, surroundings: Surroundings, read_only: str) -> None:
    trial = lab.trial(program)
    (trial.folder / "tmp dir").mkdir()
    ended = _start(trial, surroundings, read_only)
    problems = [f"status {ended.status}:\n{ended.last_lines}"] if ended.status else []
    problems += [f"a traceback:\n{ended.last_lines}"] if ended.num_tracebacks else []
    if not ended.status:
        problems += differences(trial.folder / surroundings.output_dir, lab.reference(program).folder)
    tally.count(f"{program.name}, {trial.folder}, {surroundings.name}", problems)
    if not problems:
        trial.remove()
