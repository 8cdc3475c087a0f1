"""Verification before a run: configurations, memory plan, packages, GPU, disk, models. Seconds; no model is loaded.

    python test_config_85gb.py                                   teacher_rlt_mono_85gb
    python test_config_85gb.py --config-name teacher_rlt_mono_24gb --gpu-gb 24
    python test_config_85gb.py --all --json plans.json           the plan of every run configuration

Exit status: 0 ready, 1 not ready, 2 wrong call. Every memory figure is predicted (docs/memory.md), none is measured.
pytest may collect this file: it then checks that every configuration composes and fits the GPU it is for.
"""

import sys

try:
    import hydra  # noqa: F401
except ModuleNotFoundError:
    sys.stderr.write(
        "The packages are not installed in this Python. Expected: the environment that ./launch_mono.sh makes.\n"
        "Run ./launch_mono.sh once, then: source .venv/bin/activate\n"
    )
    sys.exit(2)
from core.units import gb
from planner.fit import why_not
from planner.planned import plan_config, plan_on_own_card
from preflight.verification import DEFAULT_CONFIG, main
from schemas.compose import run_config_names


def test_every_run_config_composes_and_fits_the_card_it_is_for() -> None:
    plans = {name: plan_on_own_card(name).plan for name in run_config_names()}
    assert not [f"{name}: {why_not(plan)}" for name, plan in plans.items() if not plan.fits()]


def test_85gb_run_leaves_room() -> None:
    """At most 82.5 GB in every phase of an 85 GB GPU, and at most 55 GB with the KV cache sized by need."""
    plan = plan_config(DEFAULT_CONFIG, int(85e9)).plan
    assert gb(plan.max_bytes) <= 55
    assert plan.kv_cache_bytes == plan.kv_needed_bytes


if __name__ == "__main__":
    sys.exit(main(description=__doc__))
