"""Jobs of a pipeline: one for each stage, arm and seed, with its command and a fingerprint of all that goes into it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.fit import resolve_auto
from schemas.any_run import AnyRunConfig
from schemas.compose import compose_run_config, setting_words
from schemas.pipeline import REFERENCE, PipelineConfig, StageConfig
from schemas.run import ConfigError, load_run_config, resolved_values

_NO_PART_OF_IT = {"output_dir", "resume", "run_name"}
"""Settings of a job that say nothing about its results."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process of `train.py`, and its folder."""

    stage: str
    arm: str | None
    seed: int | None
    config_name: str
    settings: Mapping[str, Any]
    """What it sets, every reference resolved."""
    inputs: tuple[str, ...]
    """Names of the jobs whose results it reads."""
    folder: Path
    values: Mapping[str, Any]
    """Its configuration as composed and resolved; what `config.yaml` in its folder will hold."""
    config: AnyRunConfig
    fingerprint: str
    """Of its configuration and of its inputs' fingerprints: another one is another job."""

    @property
    def name(self) -> str:
        return job_name(self.stage, self.arm, self.seed)

    @property
    def title(self) -> str:
        """As the console names it: `student rl, seed 0`."""
        return f"{self.stage}{f' {self.arm}' if self.arm else ''}{'' if self.seed is None else f', seed {self.seed}'}"

    @property
    def words(self) -> list[str]:
        """Of the `train.py` call that runs it."""
        return [f"--config-name={self.config_name}", *setting_words({**self.settings, "output_dir": str(self.folder)})]


def job_name(stage: str, arm: str | None, seed: int | None) -> str:
    """Name of a job, and its folder in that of the pipeline: `student/rl/seed_0`."""
    return "/".join([stage, *([arm] if arm else []), *([] if seed is None else [f"seed_{seed}"])])


def jobs_of(pipeline: PipelineConfig) -> dict[str, Job]:
    """Name -> job, inputs before what reads them; seeds together, so that the first results come early.

    Raises:
        ConfigError: a stage's configuration is not valid; the stage is named.
        HydraException: there is none of that name.
    """
    jobs: dict[str, Job] = {}
    for seed in pipeline.seeds if pipeline.seeds is not None else [None]:
        for stage_name, stage in pipeline.stages.items():
            for arm in stage.arms or [None]:
                try:
                    job = _job(pipeline, stage_name, stage, arm, seed, jobs)
                except ConfigError as error:
                    where = f"[stage {stage_name}{f', arm {arm}' if arm else ''}]"
                    raise ConfigError("\n".join(f"{line} {where}" for line in str(error).splitlines())) from error
                jobs[job.name] = job
    return jobs


def _job(
    pipeline: PipelineConfig,
    stage_name: str,
    stage: StageConfig,
    arm: str | None,
    seed: int | None,
    earlier: Mapping[str, Job],
) -> Job:
    references = _References(pipeline, arm, seed)
    settings = references.resolve(stage.settings_of(arm))
    folder = Path(pipeline.output_dir, job_name(stage_name, arm, seed))
    composed = compose_run_config(stage.config, setting_words({**settings, "output_dir": str(folder)}))
    config = load_run_config(resolve_auto(composed, None))
    values = resolved_values(config, composed)
    inputs = tuple(dict.fromkeys(references.named))
    own = {key: value for key, value in values.items() if key not in _NO_PART_OF_IT}
    content = json.dumps([own, [earlier[name].fingerprint for name in inputs]], sort_keys=True, default=str)
    return Job(
        stage=stage_name,
        arm=arm,
        seed=seed,
        config_name=stage.config,
        settings=settings,
        inputs=inputs,
        folder=folder,
        values=values,
        config=config,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
    )


class _References:
    """`{seed}`, `{folder:STAGE}`, ... in the settings of one job, replaced; and the jobs that were named."""

    def __init__(self, pipeline: PipelineConfig, arm: str | None, seed: int | None) -> None:
        self._pipeline, self._arm, self._seed = pipeline, arm, seed
        self.named: list[str] = []

    def resolve(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self.resolve(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [resolved for inner in value for resolved in self._elements(inner)]
        if value == "{seed}":
            return self._seed
        return (
            REFERENCE.sub(lambda found: self._text(found[1], found[2], found[3]), value) if _is_text(value) else value
        )

    def _elements(self, value: Any) -> list[Any]:
        """What an element of a list stands for: `{folders:STAGE}/x` for one of each arm."""
        found = next((m for m in REFERENCE.finditer(value) if m[4]), None) if _is_text(value) else None
        if found is None:
            return [self.resolve(value)]
        folders = [self._folder(found[4], arm) for arm in self._pipeline.stages[found[4]].arms or [None]]
        return [self.resolve(value[: found.start()] + folder + value[found.end() :]) for folder in folders]

    def _text(self, what: str, stage: str | None, arm: str | None) -> str:
        if stage is None:
            return str(self._seed if what == "seed" else self._arm)
        return self._folder(stage, (arm or self._arm) if self._pipeline.stages[stage].arms else None)

    def _folder(self, stage: str, arm: str | None) -> str:
        self.named.append(name := job_name(stage, arm, self._seed))
        return str(Path(self._pipeline.output_dir, name))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def for_planning(job: Job, jobs: Mapping[str, Job]) -> Job:
    """The job with inputs that are not there yet replaced by the bases that they are made from: it can be planned.

    An adapter or a run that is named alone is left out: the base of the job's own configuration is planned.
    """
    missing = {str(jobs[name].folder): jobs[name] for name in job.inputs if not jobs[name].folder.is_dir()}
    if not missing:
        return job
    settings = {key: stood for key, value in job.settings.items() if (stood := _stand_in(key, value, missing)) != {}}
    composed = compose_run_config(job.config_name, setting_words({**settings, "output_dir": str(job.folder)}))
    config = load_run_config(resolve_auto(composed, None))
    return replace(job, values=resolved_values(config, composed), config=config)


def _stand_in(key: str, value: Any, missing: Mapping[str, Job]) -> Any:
    """A setting without the folders that are not there; {}: it says nothing any more."""
    if isinstance(value, Mapping):
        return {k: stood for k, v in value.items() if (stood := _stand_in(k, v, missing)) != {}}
    if isinstance(value, list):
        bases = [_base(name, missing) if _is_text(name) else name for name in value]
        return list(dict.fromkeys(bases)) if bases != value else value
    if not _is_text(value) or _job_in(value, missing) is None or key.endswith("dataset_id_or_path"):
        return value
    return _base(value, missing) if key == "model_name_or_path" else {}


def _base(name: str, missing: Mapping[str, Job]) -> str:
    """The model that a job which has not run yet starts from, else the name as it is."""
    job = _job_in(name, missing)
    return name if job is None else _base(str(job.values["model_name_or_path"]), missing)


def _job_in(text: str, jobs: Mapping[str, Job]) -> Job | None:
    return next((job for folder, job in jobs.items() if text == folder or text.startswith(f"{folder}/")), None)


def stages_in(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(job.stage for job in jobs))
