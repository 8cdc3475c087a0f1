"""Every benchmark at a size for a CPU, one after the other: `make bench` (ARGS="score step" for some of them).

    score, step, end_to_end     ours against plain and stock on the same work, in one process
    sync, generate              adapter and tokens against merged weights and a plain sampler
    startup                     seconds from the command to the first step
    time_plan                   the plan of time beside measured steps

Each prints its table and says what it compares in its first lines (`python -m benchmarks.NAME --help`).
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time

from core.log import console
from core.units import format_duration

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "score": ("--size", "embedded", "--groups", "2", "--repeats", "2", "--published"),
    "step": ("--rows", "16", "--repeats", "2", "--layers", "3", "--hidden", "256"),
    "end_to_end": ("--repeats", "2"),
    "sync": ("--repeats", "2"),
    "generate": ("--repeats", "2"),
    "startup": ("--repeats", "1"),
    "time_plan": ("--steps", "2", "--runs", "embedded"),
}
"""Module of this package -> words for a CPU; together under 10 minutes on two quiet cores."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; none: all")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    failed, started_s = [], time.perf_counter()
    for name in names:
        module = f"benchmarks.{name}"
        if importlib.util.find_spec(module) is None:
            continue
        console.rule(f"python -m {module} {' '.join(BENCHMARKS[name])}")
        # One thread: seconds of the process then are seconds of work, whatever else runs.
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        failed += (
            [name] if subprocess.run([sys.executable, "-m", module, *BENCHMARKS[name]], env=env).returncode else []
        )
    console.rule(format_duration(time.perf_counter() - started_s))
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
