"""A pipeline from composed values to its summary: validate, plan, run the jobs, sum up."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError
from core.gpu import find_gpu
from core.log import console, log
from pipelines.board import Board
from pipelines.jobs import jobs_of
from pipelines.plans import check_jobs, expected_seconds, plan_jobs, plan_table
from pipelines.runner import JOBS_FILE, LOGS_FOLDER, TRAIN, PipelineRunner, is_done, pipeline_lock, read_known
from pipelines.summary import summarise_pipeline
from runs.files import write_whole
from runs.run_folder import CONFIG_FILE
from schemas.pipeline import load_pipeline_config


def run_pipeline(values: Mapping[str, Any], command: Sequence[str] = TRAIN) -> int:
    """Run the jobs that are not finished; `command` with the words of a job runs that job.

    Returns:
        The exit status: 0 done, 130 interrupted, else that of the job that failed.

    Raises:
        ConfigError, UserError: the pipeline or one of its stages cannot work; nothing was started.
    """
    pipeline = load_pipeline_config(values)
    folder = Path(pipeline.output_dir).expanduser()
    jobs = jobs_of(pipeline)
    _check_folder(folder)
    known = read_known(folder)
    done = {name for name, job in jobs.items() if is_done(job, known)}
    gpu = find_gpu()
    planned = plan_jobs(jobs, None if gpu is None else gpu.total_bytes)
    console.print(plan_table(pipeline, planned, done, known))
    if pipeline.dry_run:
        return 0
    check_jobs([one for one in planned if one.job.name not in done], folder)
    jobs_at_once = pipeline.jobs_at_once if gpu is None else 1
    folder.mkdir(parents=True, exist_ok=True)
    with pipeline_lock(folder):
        write_whole(folder / CONFIG_FILE, yaml.safe_dump(dict(values), sort_keys=False))
        console.copy_to(folder / LOGS_FOLDER / "pipeline.log")
        with Board(len(jobs), jobs_at_once, expected_seconds(pipeline, planned)) as board:
            status = PipelineRunner(folder, jobs, jobs_at_once, board, command).run()
        if status == 0:
            for table in summarise_pipeline(pipeline, jobs, folder):
                console.print(table)
            log.info("the results are in %s", folder)
        console.end_copy()
    return status


def _check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: something lies there that is no pipeline.
    """
    content = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if content and not {JOBS_FILE, CONFIG_FILE, LOGS_FOLDER} & set(content):
        raise UserError(
            f"`output_dir` {str(folder)!r} holds files, and no {JOBS_FILE} of a pipeline",
            expected="a new or empty folder, or that of an earlier pipeline",
            remedy="output_dir=ANOTHER_FOLDER",
        )
