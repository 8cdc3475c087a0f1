"""What a run found to fit, kept beside its checkpoints: a resumed run does not run out of memory to find it again."""

import json
from pathlib import Path

from core.log import log
from core.types import Phase
from models.memory_retries import MemoryRetries

_FILE = "memory_limits.json"


def save_limits(checkpoint: Path, retries: MemoryRetries) -> None:
    """Nothing is written where nothing ran out of memory."""
    if retries.limits:
        (checkpoint / _FILE).write_text(json.dumps(retries.limits))


def load_limits(checkpoint: Path, retries: MemoryRetries) -> None:
    """Go on with what the run of this checkpoint found; where both know a limit, with the lower one."""
    if not (checkpoint / _FILE).is_file():
        return
    for name, limit in json.loads((checkpoint / _FILE).read_text(encoding="utf-8")).items():
        retries.limits[Phase(name)] = min(limit, retries.limits.get(Phase(name), limit))
    found = ", ".join(f"{phase} {limit}" for phase, limit in retries.limits.items())
    log.info("at once, since the run before ran out of memory: %s (%s)", found, checkpoint / _FILE)
