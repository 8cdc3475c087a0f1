"""Verification before a run: configurations, memory plan, packages, GPU, disk, models, told on the console.

`test_config_85gb.py` is its command; no model is loaded and torch is not imported.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from rich.text import Text

from core.errors import UserError
from core.gpu import find_gpu
from core.log import console
from pipelines.jobs import jobs_of, stages_in
from pipelines.plans import plan_jobs
from planner.fit import (
    Lever,
    largest_context,
    largest_micro_batch,
    largest_model,
    levers,
    nearest_fit,
    override_word,
    why_not,
)
from planner.planned import Planned, plan_config, plan_on_own_card, rates_for_plan
from planner.report import lever_lines
from preflight.readiness import (
    Check,
    check_compiler,
    check_disk,
    check_generator,
    check_gpu,
    check_host_ram,
    check_loggers,
    check_models,
    check_packages,
)
from schemas.compose import compose_run_config, pipeline_names, run_config_name, run_config_names
from schemas.pipeline import load_pipeline_config
from schemas.run import ConfigError

DEFAULT_CONFIG = "teacher_rlt_mono_85gb"
_STATUS_STYLE = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def check_configs(names: list[str]) -> Iterator[Check]:
    broken = 0
    for name in names:
        try:
            plan_on_own_card(name)
        except (HydraException, OmegaConfBaseException, ConfigError, UserError) as error:
            broken += 1
            yield Check(
                name="config", status="failure", detail=f"{name}: {error}", remedy=f"edit cfgs/run_cfg/{name}.yaml"
            )
    if not broken:
        yield Check(name="configs", status="ok", detail=f"{len(names)} run configurations compose and validate")


def check_pipeline(name: str) -> Check:
    """Check that a pipeline composes and that every job of it fits the GPU it is for."""
    try:
        jobs = jobs_of(load_pipeline_config(compose_run_config(name)))
        misfits = [one for one in plan_jobs(jobs, None) if not one.plan.fits()]
    except (HydraException, OmegaConfBaseException, ConfigError, UserError) as error:
        remedy = f"edit cfgs/pipeline_cfg/{name}.yaml"
        return Check(name="pipeline", status="failure", detail=f"{name}: {error}", remedy=remedy)
    if misfits:
        detail = f"{name}: " + "; ".join(f"{one.job.title}: {why_not(one.plan)}" for one in misfits)
        return Check(name="pipeline", status="failure", detail=detail, remedy=f"./launch_mono.sh {name} --dry-run")
    stages = ", ".join(stages_in(list(jobs.values())))
    return Check(name="pipeline", status="ok", detail=f"{name}: {len(jobs)} jobs, each planned and fits: {stages}")


def check_plan(planned: Planned) -> Check:
    if planned.fits:
        return Check(name="memory plan", status="ok", detail=planned.verdict())
    try:
        overrides = nearest_fit(planned.values, planned.plan.gpu_bytes or 0)
        words = " ".join(override_word(key, value) for key, value in overrides.items())
        remedy = f"./launch_mono.sh {planned.name} {words}"
    except UserError as error:
        remedy = str(error)
    return Check(name="memory plan", status="failure", detail=planned.verdict(), remedy=remedy)


def show_plan(planned: Planned, found: list[Lever]) -> None:
    console.print()
    for part in planned.what_is_planned():
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    console.print("  single levers:", highlight=False)
    for line in lever_lines(found):
        console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def times_of(planned: Planned) -> list[dict[str, Any]]:
    """Plans of time for json: expected lengths, then full ones."""
    return [plan.to_dict() for plan in planned.time_plans(rates_for_plan(planned.plan.gpu_bytes or 0))]


def fit_line(planned: Planned) -> str:
    """What else the GPU could take, one limit at a time."""
    settings, card = planned.plan.settings, planned.plan.gpu_bytes or 0
    return (
        f"this GPU at most: micro-batch {largest_micro_batch(settings, card) or 'none'}, context "
        f"{largest_context(settings, card) or 'none'} tokens (the model's limit is {settings.teacher.max_positions}), "
        f"model {largest_model(settings, card) or 'none known'}; each with the rest as it is"
    )


def show_checks(checks: list[Check]) -> None:
    table = Table(box=None, padding=(0, 1), show_header=False)
    for check in checks:
        table.add_row(Text(check.status, style=_STATUS_STYLE[check.status]), check.name, Text(check.detail))
        if check.remedy and check.status != "ok":
            table.add_row("", "", Text(f"-> {check.remedy}", style="italic"))
    console.print(table)


def parse_arguments(words: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default=DEFAULT_CONFIG, help="a run configuration (default: %(default)s)")
    parser.add_argument("--gpu-gb", type=float, help="plan for a GPU of this many decimal GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write checks and plans here")
    parser.add_argument("--all", action="store_true", help="plan every run configuration on the GPU it is for")
    arguments = parser.parse_args(words)
    arguments.config_name = run_config_name(arguments.config_name)
    if arguments.config_name not in run_config_names():
        parser.error(f"no run configuration {arguments.config_name!r}; there are: {', '.join(run_config_names())}")
    if arguments.gpu_gb is not None and not 0 < arguments.gpu_gb < math.inf:
        parser.error(f"--gpu-gb is {arguments.gpu_gb}; give the GPU's memory in GB, e.g. --gpu-gb 24")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    return arguments


def main(words: list[str] | None = None, description: str | None = None) -> int:
    """Check, print, write `--json`; the exit status. `words: None` are those of the command line."""
    arguments = parse_arguments(words, description)
    gpu = find_gpu()
    checks = list(check_configs(run_config_names()))
    names = run_config_names() if arguments.all else [arguments.config_name]
    broken = {check.detail.split(":")[0] for check in checks if check.name == "config"}
    plans = []
    for name in (name for name in names if name not in broken):
        if arguments.gpu_gb is not None:
            planned = plan_config(name, int(arguments.gpu_gb * 1e9))
        elif gpu is not None and not arguments.all:
            planned = plan_config(name, gpu.total_bytes)
        else:
            planned = plan_on_own_card(name)
        found = levers(planned.values)
        plans.append(planned)
        checks.append(check_plan(planned))
        show_plan(planned, found)
        console.print(f"  {fit_line(planned)}", highlight=False, soft_wrap=True)
    checks += [check_pipeline(name) for name in pipeline_names()] if arguments.all else []
    checks += check_packages()
    if plans:
        asked = next((p for p in plans if p.name == arguments.config_name), plans[0])
        checks += [check_generator(asked.config), *check_gpu(gpu, asked.plan), check_disk(asked.values, asked.plan)]
        checks += check_compiler(gpu, asked.config)
        checks += [check_host_ram(asked.plan), *check_models(asked.config), check_loggers(asked.config)]
    console.print()
    show_checks(checks)
    ready = all(check.status != "failure" for check in checks)
    console.print(f"\n{'ready' if ready else 'not ready'}", style="bold green" if ready else "bold red")
    if arguments.json is not None:
        result = {
            "ready": ready,
            "checks": [check.to_dict() for check in checks],
            "plans": {planned.name: planned.plan.to_dict() | {"time": times_of(planned)} for planned in plans},
        }
        arguments.json.write_text(json.dumps(result, indent=2))
    return 0 if ready else 1
