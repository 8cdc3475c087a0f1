"""Settings of supervised fine-tuning: the warm-up of a teacher and the distillation of a student on traces."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.any_run import TrainingRunConfig
from schemas.model import ModelArgs, check_trained_weights
from schemas.optimization import OptimizationConfig
from schemas.values import Name, PositiveInt


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    model_name_or_path: Name
    """Where training starts: hub id or local folder. `tiny` is the embedded model, made locally on first use."""
    trainable_weights: Literal["adapter", "all"] = "adapter"
    """A LoRA adapter on frozen weights, or every weight (not with quantised ones)."""
    use_muon: bool = False
    """Train the blocks' matrices with Muon and the rest with AdamW, instead of `optim`; the embedded task needs it."""
    num_train_rows: PositiveInt | None = None
    """Learn at most the first so many rows, so that runs on several datasets learn from as many; null: all."""
    model_args: ModelArgs = field(default_factory=ModelArgs)
    """How the model is loaded."""


@dataclass(frozen=True, kw_only=True)
class SupervisedRunConfig(SupervisedConfig, TrainingRunConfig, ABC):
    """One run of supervised fine-tuning; the two kinds differ in what is learned of a row."""

    sft: Any
    """TRL's own settings (SFTConfig field -> value), with TRL's defaults where the configuration says nothing."""

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self.model_args)
        OptimizationConfig.__post_init__(self)
        check_trained_weights(self.trainable_weights, self.model_args, use_muon=self.use_muon)
        if self.sft.max_length is None:
            raise ValueError(
                "`max_length` is null; the memory plan needs the longest row. Set max_length=TOKENS, such as 16384."
            )
        self.check_whole_accumulation()

    @property
    def arguments(self) -> Any:
        return self.sft

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return (self.model_name_or_path,)

    @property
    @abstractmethod
    def learns_explanations(self) -> bool:
        """The explanation behind the teacher's prompt, or (False) the student's whole answer."""

    @property
    def autocasts(self) -> bool:
        """16-bit arithmetic under autocast; TRL takes bf16 where nothing is said."""
        return bool(self.sft.bf16 or self.sft.fp16 or self.sft.bf16 is None)


@dataclass(frozen=True, kw_only=True)
class TeacherSFTRunConfig(SupervisedRunConfig):
    """The warm-up of a teacher, before reinforcement learning."""

    method: Literal["teacher_sft"]
    """Learns explanation, closing tag and end of turn behind the teacher's prompt, which is not learned."""

    @property
    def learns_explanations(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class StudentSFTRunConfig(SupervisedRunConfig):
    """The distillation of a student on traces."""

    method: Literal["student_sft"]
    """Learns the whole answer to a question, which is not learned: thought, solution, end of turn."""

    @property
    def learns_explanations(self) -> bool:
        return False
