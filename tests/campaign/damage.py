"""Damaged files: each file of an interrupted run's folder, its checkpoints included, damaged in each way."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaign.faults import Fault
from tests.campaign.lab import Lab, Program
from tests.campaign.tally import Tally


def _flipped(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
    "zeroed": lambda content, rng: bytes(len(content)),
    "deleted": lambda content, rng: None,
    "a bit flipped": _flipped,
    "garbage": lambda content, rng: rng.randbytes(len(content)),
}
_THE_RUNS_OWN = ("config.yaml", "metrics.jsonl")
"""What a run cannot be continued without: it may be refused, and nothing of the folder may change then."""
_MAY_CHANGE = {".lock", "logs/training.log"}
_SET_ASIDE = "*.damaged*"
"""What a run keeps and does not use."""


def damage_and_continue(lab: Lab, tally: Tally, program: Program, num_files: int) -> None:
    rng = lab.random(f"damage {program.name}")
    template = interrupted_run(lab, program)
    names = [str(path.relative_to(template)) for path in sorted(template.rglob("*")) if path.stat().st_size]
    names = [name for name in names if (template / name).is_file()]
    cases = [(name, damage, rng.random()) for name in names for damage in DAMAGES]
    newest = [case for case in cases if "checkpoint-4/" in case[0]]
    others = [case for case in cases if "checkpoint-4/" not in case[0]]
    num_newest = min(len(newest), -(-num_files // 2))
    chosen = rng.sample(newest, num_newest) + rng.sample(others, min(len(others), num_files - num_newest))
    lab.each(chosen, lambda case: _try(lab, tally, program, template, *case))


def interrupted_run(lab: Lab, program: Program) -> Path:
    """A run that was killed in its last step: checkpoint-2 and checkpoint-4 are there."""
    trial = lab.trial(program)
    calls = lab.reference(program).counts
    point = next(point for point in program.points if point.endswith("oss"))
    ended = trial.end(faults=[Fault(point, nth=calls[point])])
    assert ended.status == -9 and (trial.run / "checkpoint-4").is_dir(), ended.last_lines
    return trial.run


def _try(lab: Lab, tally: Tally, program: Program, template: Path, name: str, damage: str, seed: float) -> None:
    trial = lab.trial(program)
    shutil.copytree(template, trial.run)
    damaged = trial.run / name
    content = DAMAGES[damage](damaged.read_bytes(), random.Random(seed))
    damaged.unlink() if content is None else damaged.write_bytes(content)
    before = _contents(trial.run)
    ended = trial.end()
    problems = [f"a traceback:\n{ended.last_lines}"] if ended.num_tracebacks else []
    if ended.status == 2 and name in _THE_RUNS_OWN:
        problems += [] if name in ended.says else [f"the message does not name {name}:\n{ended.last_lines}"]
        after = _contents(trial.run)
        changed = sorted({path for path, was in before.items() if after.get(path) != was} - _MAY_CHANGE)
        problems += [f"changed although refused: {changed}"] * bool(changed)
    elif ended.status != 0:
        problems += [f"status {ended.status}:\n{ended.last_lines}"]
    else:
        if name.startswith("checkpoint-4/") and "checkpoint-4" not in ended.says.replace("/4", ""):
            problems.append("nothing was said of checkpoint-4")
        kept = any(path.name.startswith("run.") for path in trial.folder.iterdir())
        but_for = () if kept or name.startswith("checkpoint-") else (name, "summary.json")
        problems += trial.differences(but_for=(*but_for, _SET_ASIDE))
    tally.count(f"{program.name}, {trial.folder}, {name} {damage}", problems)
    if not problems:
        trial.remove()


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
