"""Seconds to plan 100 run configurations in one process: composed and validated each time, and arithmetic alone."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.log import console
from planner.plan import plan, plan_run
from schemas.compose import compose_run_config, run_config_names
from schemas.run import load_run_config

NUM_CONFIGS = 100
CARD_BYTES = int(85e9)


def main() -> None:
    names = run_config_names()
    started = time.perf_counter()
    plans = []
    for k in range(NUM_CONFIGS):
        values = compose_run_config(names[k % len(names)], [f"max_completion_length={1024 + 32 * k}"])
        plans.append(plan_run(load_run_config(values), CARD_BYTES))
    whole_s = time.perf_counter() - started
    started = time.perf_counter()
    for memory_plan in plans:
        plan(memory_plan.settings, CARD_BYTES)
    arithmetic_s = time.perf_counter() - started
    console.print(f"{NUM_CONFIGS} configurations composed, validated, planned: {whole_s:.2f} s")
    console.print(f"the plans alone: {1e3 * arithmetic_s:.1f} ms, {whole_s / arithmetic_s:.0f} times less")


if __name__ == "__main__":
    main()
