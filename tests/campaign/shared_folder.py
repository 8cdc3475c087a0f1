"""Two runs in one folder: one of them is refused in words, the other one is not disturbed."""

from tests.campaign.lab import Lab, Program
from tests.campaign.tally import Tally


def start_two(lab: Lab, tally: Tally, program: Program, num_times: int) -> None:
    """The same command twice, or the second with another setting, at the same time or a little later."""
    rng = lab.random(f"shared folder {program.name}")
    seconds = lab.reference(program).seconds
    cases = [(rng.choice((0.0, rng.uniform(0, 0.9 * seconds))), rng.random() < 0.5) for _ in range(num_times)]
    for case in cases:
        _try(lab, tally, program, *case)


def _try(lab: Lab, tally: Tally, program: Program, after_s: float, other_settings: bool) -> None:
    trial = lab.trial(program)
    first = trial.start()
    first.wait(after_s)
    second = trial.start(*(["learning_rate=1e-4"] if other_settings else []))
    ends = [first.end(), second.end()]
    problems = [f"a traceback:\n{ended.last_lines}" for ended in ends if ended.num_tracebacks]
    statuses = sorted(str(ended.status) for ended in ends)
    if statuses == ["0", "0"]:  # the second began when the first was done: the first is kept beside it
        problems += [] if (trial.folder / "run.1").is_dir() else ["both ran in one folder"]
    elif statuses != ["0", "2"]:
        problems += [f"statuses {statuses}:\n{ends[0].last_lines}\n{ends[1].last_lines}"]
    else:
        refused = next(ended for ended in ends if ended.status == 2)
        problems += [] if "another process" in refused.says else [f"refused in other words:\n{refused.last_lines}"]
        if ends[0].status == 0 or not other_settings:
            problems += trial.differences()
    settings = "other settings" if other_settings else "the same command"
    tally.count(f"{program.name}, {trial.folder}, {settings} after {after_s:.2f} s", problems)
    if not problems:
        trial.remove()
