"""A disk that runs full at each writer: a small filesystem of the trial's own is filled at a moment of the run."""

import subprocess
import tempfile
from pathlib import Path

from tests.campaign.faults import BALLAST, FILES, Fault
from tests.campaign.lab import Lab, Program
from tests.campaign.tally import Tally

_SIZE = "256m"


def fill_and_continue(lab: Lab, tally: Tally, program: Program, num_times: int) -> None:
    """The run says what happened and ends; with space again, the same command continues."""
    obstacle = mount_obstacle(lab.base)
    if obstacle:
        tally.skipped = obstacle
        return
    rng = lab.random(f"disk full {program.name}")
    num_changes = lab.reference(program).counts[FILES]
    faults = [
        Fault(FILES, rng.randint(1, num_changes), action=f"fill:{rng.choice((0, 0, 4096, 65536))}")
        for _ in range(num_times)
    ]
    lab.each(faults, lambda fault: _try(lab, tally, program, fault))


def mount_obstacle(base: Path) -> str:
    """Why no small filesystem can be mounted here; empty where one can."""
    probe = base / "probe"
    probe.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True, text=True)
    if done.returncode == 0:
        subprocess.run(["umount", probe], check=True)
    return "" if done.returncode == 0 else f"needs a filesystem of its own: {done.stderr.strip()}"


def _try(lab: Lab, tally: Tally, program: Program, fault: Fault) -> None:
    folder = Path(tempfile.mkdtemp(prefix="disk-", dir=lab.base))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", folder], check=True)
    try:
        trial = lab.trial(program, folder)
        ended = trial.end(faults=[fault])
        problems = []
        if ended.status not in (0, 1, 2):
            problems.append(f"status {ended.status}:\n{ended.last_lines}")
        if ended.num_tracebacks:
            problems.append(f"a traceback:\n{ended.last_lines}")
        if ended.status in (1, 2) and not any(word in ended.says for word in ("No space left", "disk", "full")):
            problems.append(f"nothing said of the disk:\n{ended.last_lines}")
        (folder / BALLAST).unlink(missing_ok=True)
        problems += trial.continued() if ended.status != 0 else trial.differences(but_for=["report.html"])
        tally.count(f"{program.name}, {fault}", problems)
    finally:
        subprocess.run(["umount", "-l", folder], check=False)
