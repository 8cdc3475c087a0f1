"""The table of methods: what a run of each kind is validated, planned, verified, trained and shown with.

A method is one file per layer that it needs and one entry here. Entries of higher layers are import paths, resolved
when they are asked for, so that imports go one way. Nothing else asks of what class a run configuration is.
"""

import pkgutil
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from schemas.any_run import AnyRunConfig, TrainingRunConfig
from schemas.library_settings import GRPO_CONFIG, SAMPLING_ARGUMENTS, SFT_CONFIG, TRAINING_ARGUMENTS, LibrarySettings

DEFAULT_METHOD = "rlt"
ConfigT = TypeVar("ConfigT", bound=AnyRunConfig)


@dataclass(frozen=True)
class Entry:
    """A function or object of any layer by its import path, `package.module:name`; calling it calls that function."""

    path: str

    @property
    def object(self) -> Any:
        return pkgutil.resolve_name(self.path)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.object(*args, **keywords)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One kind of run."""

    title: str
    """How messages speak of a run of this kind, with its article."""
    index: str
    """Hydra index in `cfgs/` that its run configurations start from."""
    config: Entry
    """Configuration class, derived from `AnyRunConfig`."""
    library: LibrarySettings
    """What becomes of the library's own settings."""
    arguments_field: str
    """Field of the configuration class that holds those settings."""
    build_arguments: Entry | None
    """(config, use_cpu=...) -> the library's arguments object; None: nothing is trained."""
    roles: tuple[str, ...]
    """Models that it loads: the one that is trained or sampled, then frozen ones, in the order of `optimize_models`."""
    rows: str
    """What the rows of a step are called."""
    plan_settings: Entry
    """(config, allow_download=...) -> `planner.settings.PlanSettings`, which can plan themselves."""
    choose_fp8: Entry | None = None
    """(config, GPU) -> the settings that fp8 brings; None: there is neither a generator nor a frozen model."""
    train: Entry
    """(config, values, plan, device, on_results) -> the finished run."""
    report: Entry
    """Rows of the table at the end: a `Report`, or where nothing is trained what makes that table."""
    card: Entry | None
    """(config, trainer) -> the model card; None: no model is written."""

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        return self.roles[1:]

    def card_text(self, config: AnyRunConfig, trainer: Any) -> str:
        assert self.card is not None, "a method whose trainer saves models has a card for them"
        return str(self.card(config, trainer))

    def own_field_names(self) -> set[str]:
        """Settings that this project declares."""
        return {field.name for field in fields(self.config.object)} - {self.arguments_field}


def _supervised(title: str, config: str) -> Method:
    """Supervised fine-tuning; what is learned of a row is all that differs (data/supervised.py)."""
    return Method(
        title=title,
        index="train_sft",
        config=Entry(f"schemas.sft:{config}"),
        library=SFT_CONFIG,
        arguments_field="sft",
        build_arguments=Entry("trainers.sft_run:build_sft_args"),
        roles=("model",),
        rows="rows",
        plan_settings=Entry("planner.sft:supervised_settings"),
        train=Entry("trainers.sft_run:train_supervised"),
        report=Entry("runs.summary:SFT_REPORT"),
        card=Entry("trainers.model_card:supervised_card"),
    )


METHODS: dict[str, Method] = {
    "rlt": Method(
        title="a teacher's run",
        index="train",
        config=Entry("schemas.run:RunConfig"),
        library=GRPO_CONFIG,
        arguments_field="grpo",
        build_arguments=Entry("trainers.grpo_args:build_grpo_args"),
        roles=("teacher", "student", "reference"),
        rows="completions",
        plan_settings=Entry("planner.teacher:teacher_settings"),
        choose_fp8=Entry("optimization.fp8_optim:choose_fp8_of_teacher"),
        train=Entry("trainers.teacher_run:train_teacher"),
        report=Entry("runs.summary:TEACHER_REPORT"),
        card=Entry("trainers.model_card:teacher_card"),
    ),
    "masked_diffusion": Method(
        title="a masked-diffusion run",
        index="train_masked_diffusion",
        config=Entry("schemas.llada:MaskedDiffusionRunConfig"),
        library=TRAINING_ARGUMENTS,
        arguments_field="args",
        build_arguments=Entry("trainers.masked_diffusion_run:build_training_args"),
        roles=("model",),
        rows="rows",
        plan_settings=Entry("planner.masked_diffusion:masked_diffusion_settings"),
        train=Entry("trainers.masked_diffusion_run:train_masked_diffusion"),
        report=Entry("runs.summary:DIFFUSION_REPORT"),
        card=Entry("trainers.model_card:masked_diffusion_card"),
    ),
    "teacher_sft": _supervised("a teacher's warm-up", "TeacherSFTRunConfig"),
    "student_sft": _supervised("a student's distillation", "StudentSFTRunConfig"),
    "collect_traces": Method(
        title="a collection of traces",
        index="collect_traces",
        config=Entry("schemas.traces:TracesRunConfig"),
        library=SAMPLING_ARGUMENTS,
        arguments_field="sampling",
        build_arguments=None,
        roles=("teacher", "student"),
        rows="explanations",
        plan_settings=Entry("planner.traces:traces_settings"),
        choose_fp8=Entry("optimization.fp8_optim:choose_fp8_of_teacher"),
        train=Entry("traces.run:collect_traces"),
        report=Entry("traces.summary:TRACES_REPORT"),
        card=None,
    ),
    "evaluate": Method(
        title="an evaluation",
        index="evaluate",
        config=Entry("schemas.evaluate:EvaluateRunConfig"),
        library=SAMPLING_ARGUMENTS,
        arguments_field="sampling",
        build_arguments=None,
        roles=("model",),
        rows="answers",
        plan_settings=Entry("planner.evaluate:evaluate_settings"),
        choose_fp8=Entry("optimization.fp8_optim:choose_fp8_of_evaluation"),
        train=Entry("evaluation.run:evaluate_models"),
        report=Entry("evaluation.results:EVALUATION_REPORT"),
        card=None,
    ),
}


def method_of(config: AnyRunConfig) -> Method:
    return METHODS[config.method]


def as_training(config: AnyRunConfig) -> TrainingRunConfig | None:
    """The configuration where its run trains; None where it only samples and scores."""
    return as_kind(config, TrainingRunConfig)  # type: ignore[type-abstract]


def as_kind(config: AnyRunConfig, config_class: type[ConfigT]) -> ConfigT | None:
    """The configuration where it is of that class, for code that serves runs of one kind alone; else None."""
    return config if isinstance(config, config_class) else None
