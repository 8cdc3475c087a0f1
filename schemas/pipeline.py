"""Settings of a pipeline: an ordered list of stages, each a run configuration, over arms and seeds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from schemas.run import describe_problems, raise_problems
from schemas.secrets import secret_problems
from schemas.values import Name, NotEmpty, PositiveFloat

PIPELINE = "pipeline"
"""What `method` says in a pipeline's configuration."""
Part = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
"""The name of a stage or an arm; a folder is called so."""
REFERENCE = re.compile(r"\{(seed|arm|folder:(\w+)(?:/(\w+))?|folders:(\w+))\}")
_BRACES = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: a run configuration and what is set in it, for each arm and seed a job of its own."""

    __pydantic_config__ = {"extra": "forbid"}

    config: Name
    """Run configuration that its jobs start from."""
    settings: dict[str, Any] = field(default_factory=lambda: {})
    """What its jobs set. `{seed}` and `{arm}` stand for those of the job, `{folder:STAGE}` for the results of an
    earlier stage's job of the same seed and arm, `{folder:STAGE/ARM}` for those of another arm, and in a list
    `{folders:STAGE}` for those of all arms of the job's seed."""
    arms: dict[Part, dict[str, Any] | None] = field(default_factory=lambda: {})
    """Arm -> what it sets differently; no arms: one job for each seed."""
    expected_minutes: PositiveFloat | None = None
    """How long a job takes, for the time that is left until one of the stage has finished; null: not known before."""

    def settings_of(self, arm: str | None) -> dict[str, Any]:
        """What the jobs of an arm set, references as they stand."""
        return merged(self.settings, (self.arms[arm] if arm is not None else None) or {})


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A pipeline. Every job is a process of `train.py` with a folder of its own in `output_dir`."""

    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["pipeline"]
    """What this is."""
    run_name: Name
    """The name of the configuration unless set; names the folder."""
    output_dir: Name
    """Folder of the pipeline: `STAGE/ARM/seed_N/` of each job, `logs/`, and the summary of all."""
    stages: Annotated[dict[Part, StageConfig], Field(min_length=1)]
    """Name -> stage, in the order in which they run."""
    seeds: NotEmpty[Annotated[int, Field(ge=0, le=999_999_999)]] | None = None
    """Each stage runs once for each of these; null: once, with the seed of its configuration."""
    jobs_at_once: Annotated[int, Field(ge=1, le=64)] = 1
    """Jobs that may run side by side on a CPU, which shares its cores among them; on a GPU it is always one."""
    dry_run: bool = False
    """Show jobs, plans, disk and time, and start nothing; `--dry-run` says the same."""

    def __post_init__(self) -> None:
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` names one twice: {self.seeds}. Name each once.")
        names = list(self.stages)
        for place, (name, stage) in enumerate(self.stages.items()):
            for arm in stage.arms or [None]:
                settings = stage.settings_of(arm)
                for text, in_list in _texts(settings):
                    self._check_references(name, arm, text, in_list, earlier=names[:place])

    def _check_references(self, stage: str, arm: str | None, text: str, in_list: bool, earlier: list[str]) -> None:
        where = f"`stages.{stage}.settings`" if arm is None else f"`stages.{stage}` with arm {arm}"
        for found in _BRACES.finditer(text):
            reference = REFERENCE.fullmatch(found[0])
            if reference is None:
                raise ValueError(
                    f"{where} says {found[0]}. Use {{seed}}, {{arm}}, {{folder:STAGE}}, {{folder:STAGE/ARM}} or "
                    "{folders:STAGE}."
                )
            named = reference[2] or reference[4]
            if reference[4] and not in_list:
                raise ValueError(f"{where} says {found[0]} outside of a list. Use [{found[0]}], or {{folder:{named}}}.")
            if reference[1] == "seed" and self.seeds is None:
                raise ValueError(f"{where} says {{seed}}, and `seeds` is null. Set seeds=[0], or leave it out.")
            if reference[1] == "arm" and arm is None:
                raise ValueError(f"{where} says {{arm}}, and the stage has no arms. Leave it out.")
            if named is None:
                continue
            if named not in earlier:
                known = ", ".join(earlier) or "none"
                raise ValueError(f"{where} names the stage {named!r}. Use one that comes before it: {known}.")
            arms = self.stages[named].arms
            if reference[2] and (wanted := reference[3] or (arm if arms else None)) not in (arms or [None]):
                raise ValueError(
                    f"{where} names {found[0]}, and stage {named} has "
                    + (f"the arms {', '.join(arms)}, not {wanted}." if arms else "no arms.")
                    + f" Use {{folder:{named}{'/ARM' if arms else ''}}}."
                )


def load_pipeline_config(values: Mapping[str, Any]) -> PipelineConfig:
    """Validate a composed pipeline.

    Raises:
        ConfigError: unknown key, wrong type, or a reference to a stage that does not come before; all are listed.
    """
    own = {field.name for field in fields(PipelineConfig)}
    raise_problems(list(secret_problems(values)))  # alone: other messages show values
    problems = [
        f"`{key}` is not a setting of a pipeline. Set it in a stage: stages.STAGE.settings.{key}=VALUE."
        for key in values
        if key not in own
    ]
    try:
        config = TypeAdapter(PipelineConfig).validate_python({k: v for k, v in values.items() if k in own})
    except ValidationError as error:
        problems += describe_problems(error, values)
    raise_problems(problems)
    return config


def merged(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `others` in their place, sections such as `model_args` key by key."""
    result = dict(settings)
    for key, value in others.items():
        is_section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_section else value
    return result


def _texts(value: Any, in_list: bool = False) -> list[tuple[str, bool]]:
    """All texts in a setting, and whether each is an element of a list."""
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in _texts(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in _texts(inner, in_list=True)]
    return [(value, in_list)] if isinstance(value, str) else []
