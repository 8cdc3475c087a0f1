"""One run of `train.py` of the checkout that is the current folder, up to the end of its first optimizer step.

    python startup_parts.py FILE parts|imports ARGUMENTS OF TRAIN.PY

Writes CPU seconds (user and system, of this process and of the children that it waited for) per part to FILE as JSON:
of the run's parts (`parts`), or of the top-level packages that modules belong to, wherever they are imported, and of
`code`, which is all else (`imports`). Needs nothing but the standard library, so that what is loaded is the run's.
"""

import importlib.abc
import importlib.machinery
import json
import os
import resource
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAST = "step 1"
_PARTS = {
    "trainers.build": {"check_before_loading": "data", "_start_generator": "engine", "_make_canary": "engine"},
    "models.host": {"ModelHost.__init__": "models"},
    "trainers.base": {"RunTrainer.evaluate": "evaluation before step 1"},
    "trainers.teacher_grpo": {"TeacherGRPOTrainer.__init__": "trainer", "TeacherGRPOTrainer.training_step": LAST},
}
"""Module -> its functions and methods -> the part of the run that they are."""


class Parts:
    """CPU seconds of nested parts, each charged to the innermost."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = defaultdict(float)
        self._open, self._charged_s = ["start"], 0.0

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        now_s = sum(use.ru_utime + use.ru_stime for use in uses)
        self._seconds[self._open[-1]] += now_s - self._charged_s
        self._charged_s = now_s

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()
                if part == LAST:
                    self._file.write_text(json.dumps(self._seconds))
                    os._exit(0)

        return run


class TimedLoader(importlib.abc.Loader):
    """Loads a module, charging it to its package, and times those of its functions that are parts of a run."""

    def __init__(self, loader: Any, name: str, parts: Parts, by_package: bool) -> None:
        self._loader, self._name, self._parts, self._by_package = loader, name, parts, by_package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        if self._by_package:
            self._parts.enter(self._name.partition(".")[0])
        try:
            self._loader.exec_module(module)
        finally:
            if self._by_package:
                self._parts.leave()
        for path, part in _PARTS.get(self._name, {}).items():
            if self._by_package and part != LAST:
                continue
            owner, _, name = path.rpartition(".")
            holder = getattr(module, owner) if owner else module
            setattr(holder, name, self._parts.timed(getattr(holder, name), part))


class TimedFinder(importlib.abc.MetaPathFinder):
    def __init__(self, parts: Parts, by_package: bool) -> None:
        self._parts, self._by_package = parts, by_package

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not self._by_package and name not in _PARTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = TimedLoader(spec.loader, name, self._parts, self._by_package)
        return spec


def main() -> None:
    file, kind, *words = sys.argv[1:]
    sys.meta_path.insert(0, TimedFinder(Parts(Path(file)), kind == "imports"))
    sys.argv = ["train.py", *words]
    sys.path[0] = os.getcwd()
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    main()
