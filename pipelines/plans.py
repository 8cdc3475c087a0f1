"""What the jobs of a pipeline will need: memory, disk and time, before anything is started."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from core.errors import UserError
from core.units import format_duration, format_gb, gb
from pipelines.board import Known, time_left
from pipelines.jobs import Job, for_planning
from planner.fit import own_card_bytes, why_not
from planner.plan import MemoryPlan, plan_run
from planner.planned import rates_for_plan
from planner.time import Lengths, plan_time
from schemas.pipeline import PipelineConfig


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    job: Job
    plan: MemoryPlan
    disk_bytes: float
    """Checkpoints, and what else it writes of that size."""
    run_s: float | None
    """Of its steps, by the plan of time with the lengths that are expected; None: its method has none."""


def plan_jobs(jobs: Mapping[str, Job], gpu_bytes: int | None) -> list[PlannedJob]:
    """Each job on a GPU of `gpu_bytes`; None: on the one that its configuration is for.

    Raises:
        UserError: a model's shape is not known here.
    """
    planned = []
    for job in jobs.values():
        stood_in = for_planning(job, jobs)
        card = gpu_bytes if gpu_bytes is not None else own_card_bytes(stood_in.values)
        plan = plan_run(stood_in.config, card)
        num_checkpoints = (job.values.get("save_total_limit") or 10) + 1
        disk_bytes = plan.settings.written_bytes(num_checkpoints)
        planned.append(PlannedJob(job=job, plan=plan, disk_bytes=disk_bytes, run_s=_run_seconds(plan, card)))
    return planned


def _run_seconds(plan: MemoryPlan, gpu_bytes: int) -> float | None:
    settings = plan.settings
    lengths = Lengths.expected(settings.max_prompt_len, settings.max_completion_len)
    time_plan = plan_time(settings, rates_for_plan(gpu_bytes), lengths)
    return None if time_plan is None else time_plan.run_s


def check_jobs(planned: Sequence[PlannedJob], folder: Path) -> None:
    """Refuse what cannot end well: a job that exceeds the GPU, or a disk that is too small for those to do.

    Raises:
        UserError: so it is.
    """
    misfits = [
        f"{one.job.title}: {why_not(one.plan)}"
        for one in planned
        if not one.plan.fits() and not one.job.values.get("allow_oversubscription")
    ]
    if misfits:
        raise UserError(
            "jobs that exceed the GPU:\n  " + "\n  ".join(misfits),
            expected="every phase of every job within 97 % of the GPU",
            remedy="python test_config_85gb.py --config-name CONFIG shows what would fit; "
            "stages.STAGE.settings.KEY=VALUE sets it",
        )
    needed, free = sum(one.disk_bytes for one in planned), free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{format_gb(free)} free at {folder}, and the jobs write about {format_gb(needed)}",
            expected="room for all results and checkpoints",
            remedy="set output_dir to a larger disk, or save_total_limit=1 in the stages that train",
        )


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or will lie on."""
    folder = folder.expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def plan_table(pipeline: PipelineConfig, planned: Sequence[PlannedJob], done: set[str], known: Known) -> Table:
    """One row for each stage and arm: what its jobs need. Everything is predicted."""
    to_do = [one.job for one in planned if one.job.name not in done]
    expected_s = expected_seconds(pipeline, planned)
    left = time_left([], to_do, known, pipeline.jobs_at_once, expected_s)
    disk = sum(one.disk_bytes for one in planned if one.job.name not in done)
    table = Table(
        title=f"{pipeline.run_name}: {len(planned)} jobs, {len(done)} of them finished",
        caption=f"predicted; {pipeline.jobs_at_once} at once, {left}; disk: {format_gb(disk)} to be written, "
        f"{format_gb(free_bytes(Path(pipeline.output_dir)))} free",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("stage", "arm", "run configuration"):
        table.add_column(column)
    for column in ("finished", "peak GB", "phase", "disk GB each", "time each"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, str | None], list[PlannedJob]] = {}
    for one in planned:
        rows.setdefault((one.job.stage, one.job.arm), []).append(one)
    for (stage, arm), group in rows.items():
        plan = max((one.plan for one in group), key=lambda plan: plan.max_bytes)
        num_done = sum(one.job.name in done for one in group)
        table.add_row(
            stage,
            arm or "",
            group[0].job.config_name,
            f"{num_done} of {len(group)}",
            f"{gb(plan.max_bytes):.1f}",
            str(plan.binding_phase),
            f"{gb(max(one.disk_bytes for one in group)):.2f}",
            _time_each(group, known, expected_s[stage]),
        )
    return table


def expected_seconds(pipeline: PipelineConfig, planned: Sequence[PlannedJob]) -> dict[str, float | None]:
    """Stage -> seconds of one of its jobs: as its configuration says, else by the plan of time; None: not known."""
    by_plan = {one.job.stage: one.run_s for one in planned}
    return {
        name: by_plan.get(name) if stage.expected_minutes is None else stage.expected_minutes * 60
        for name, stage in pipeline.stages.items()
    }


def _time_each(group: Sequence[PlannedJob], known: Known, expected_s: float | None) -> str:
    """Mean of those that have finished, else what is expected."""
    times = [seconds for one in group if (seconds := known.get(one.job.name, {}).get("seconds")) is not None]
    if times:
        return format_duration(sum(times) / len(times))
    return "not known" if expected_s is None else f"expected {format_duration(expected_s)}"
