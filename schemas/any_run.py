"""AnyRunConfig: the base class of the run configurations, and TrainingRunConfig: of those that train."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.data import DataConfig
from schemas.model import ModelArgs
from schemas.optimization import OptimizationConfig, TrainingOptimizationConfig
from schemas.trainer import MachineConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class AnyRunConfig(DataConfig, MachineConfig, OptimizationConfig, ABC):
    """One run. What differs between methods and is asked by shared code is a property here, or stands in the table."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    method: str
    model_args: ModelArgs

    @property
    @abstractmethod
    def arguments(self) -> Any:
        """The library's own settings, in the field that the table of methods names."""

    @property
    @abstractmethod
    def model_names(self) -> tuple[str | None, ...]:
        """Hub ids and folders that the run loads from; None where a role has none of its own."""

    @property
    def run_folders(self) -> tuple[str, ...]:
        """Folders of earlier runs that this one takes a model from."""
        return ()

    @property
    def run_name(self) -> str:
        """The name of the run configuration unless set; names the output folder."""
        return self.arguments.run_name

    @property
    def learns_explanations(self) -> bool:
        """Whether it makes a teacher, which explains a given solution, and not a student, which answers."""
        return False

    @property
    def no_vllm(self) -> str | None:
        """Why no vLLM is needed in this process; None where one is wanted."""
        return "this run samples nothing"

    @property
    def requires_vllm(self) -> bool:
        """Whether the run cannot start without vLLM."""
        return False

    @property
    def packs_rows(self) -> bool:
        """Whether samples share a row, kept apart by a mask."""
        return False

    @property
    def has_own_frozen_model(self) -> bool:
        """Whether a student or a reference is loaded beside what is trained."""
        return False

    @property
    def frozen_find_outliers(self) -> bool:
        """Whether frozen models are scored in LLM.int8 with a threshold, which looks for outlier columns."""
        return False

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Settings that are sections of their own -> what they hold."""
        return {"model_args": ModelArgs}

    @classmethod
    def without_effect(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Settings that would be ignored. Asked of the user's values only: levers may set the same for any run."""
        args = values.get("model_args")
        if not isinstance(args, Mapping):  # as a wrong type it has a message of its own
            return
        if args.get("int8_matmul", "dequantize") == "dequantize" and args.get("llm_int8_threshold", 6.0) != 6.0:
            yield (
                f"`model_args.llm_int8_threshold` is {args['llm_int8_threshold']} with `model_args.int8_matmul` "
                "dequantize, which looks for no outliers. Set model_args.int8_matmul=llm_int8, or leave it at 6.0."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRunConfig(TrainerConfig, TrainingOptimizationConfig, AnyRunConfig, ABC):
    """One run that trains weights; its `arguments` are those of a trainer."""

    def check_whole_accumulation(self) -> None:
        """
        Raises:
            ValueError: a step is not made of whole micro-batches.
        """
        micro = self.arguments.per_device_train_batch_size
        if self.train_batch_size % micro:
            raise ValueError(
                f"`train_batch_size` {self.train_batch_size} is not a multiple of `per_device_train_batch_size` "
                f"{micro}: gradient accumulation must be whole. Use a divisor of {self.train_batch_size}."
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.train_batch_size // self.arguments.per_device_train_batch_size
