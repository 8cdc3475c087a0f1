"""Settings of the collection of traces, and the configuration of such a run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.sampled_run import SampledRunConfig
from schemas.values import Name, PositiveInt

_NOT_HERE = {
    "reference_model": ("shared", "there is no reference"),
    "importance_sampling_correction": ("auto", "there is no loss to correct"),
    "use_vllm_server": (False, "the generator runs in this process, from seeds of its own for each trace"),
    "extra_rewards": ([], "traces are ranked by the RLT reward alone"),
}
"""Settings of a training that a collection has no use for -> the value that they may have, and why."""


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    """What a trained teacher writes for students: explanations of every question, ranked by the reward."""

    method: Literal["collect_traces"]
    """What the run does."""
    teacher_run: Name | None = None
    """Folder of the run (or of a checkpoint of it) whose teacher writes; null: the untrained `model_name_or_path`."""
    num_samples: Annotated[int, Field(ge=1, le=1024)]
    """Explanations per question."""
    choose: Literal["best", "random", "first", "all"] = "best"
    """Which of a question's become training data: the one of the highest reward, any one, the first one, or each."""
    choose_malformed: bool = False
    """Choose also among explanations that were cut off, are empty, or hold a tag, a special token or broken bytes."""
    max_trace_tokens: PositiveInt | None = None
    """Longer explanations are never chosen; null: none is too long (`max_completion_length` cuts them off)."""
    num_questions: PositiveInt | None = None
    """Take the first so many questions; null: all that are not held out."""
    questions_per_chunk: PositiveInt = 64
    """Questions that are sampled, scored and saved together: what a run that is killed has to do again."""
    judge_model: Name | None = None
    """A student that has no part in the reward: the summary compares the best of n and a random one under it too."""
    push_to_hub: Name | None = None
    """Dataset repository (`user/name`) that gets the result; null: nothing is uploaded."""
    push_private: bool = True
    """Whether a repository that is made for it is private."""


@dataclass(frozen=True, kw_only=True)
class TracesRunConfig(TracesConfig, SampledRunConfig):
    """One run that collects traces."""

    sampling: Any
    """The settings of sampling, which are TRL's."""

    def __post_init__(self) -> None:
        SampledRunConfig.__post_init__(self)
        if self.resume not in ("auto", "never"):
            raise ValueError(
                f"`resume` is {self.resume!r}; a collection has no checkpoints, its unfinished folder is what it goes "
                "on from. Use resume=auto or resume=never."
            )

    @property
    def arguments(self) -> Any:
        return self.sampling

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return *super().model_names, self.judge_model

    @property
    def run_folders(self) -> tuple[str, ...]:
        return () if self.teacher_run is None else (self.teacher_run,)

    @classmethod
    def without_effect(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Settings that only a training uses."""
        yield from super().without_effect(values)
        args = values.get("model_args")
        if isinstance(args, Mapping) and args.get("adapter_path") is not None:
            yield "`model_args.adapter_path` is set, and `teacher_run` names the teacher. Use teacher_run=FOLDER."
        for key, (default, why) in _NOT_HERE.items():
            if values.get(key, default) != default:
                yield f"`{key}` cannot be set: {why}. Remove it."
