"""A teacher's run from its validated configuration to its summary: cheap checks first, weights last."""

import shutil
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from planner.plan import MemoryPlan
from runs.summary import FinishedRun, memory_by_phase, summarise
from schemas.methods import method_of
from schemas.run import RunConfig
from trainers.build import build_trainer, check_before_loading
from trainers.time_plan import tell_time_plan, time_beside_plan


def train_teacher(
    config: RunConfig,
    values: dict[str, Any],
    plan: MemoryPlan,
    device: torch.device,
    on_results: Callable[[FinishedRun], None],
) -> FinishedRun:
    """Build the parts of the run, train, evaluate, save; `on_results` is called before the engine is closed.

    Raises:
        UserError, ConfigError: the run cannot work; the run folder was not touched.
    """
    prepared = check_before_loading(config, values, plan, device)
    try:
        with closing(build_trainer(prepared)) as trainer:
            tell_time_plan(trainer)
            trainer.train(resume_from_checkpoint=prepared.resume_from)
            trainer.finish()
            report = method_of(config).report.object
            memory, seconds = memory_by_phase(plan, trainer.meter), time_beside_plan(trainer)
            summary = summarise(prepared.folder.path, memory, report, seconds)
            finished = FinishedRun(folder=prepared.folder.path, summary=summary, report=report)
            on_results(finished)
            return finished
    finally:
        shutil.rmtree(prepared.export_folder, ignore_errors=True)
