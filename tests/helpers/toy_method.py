"""A method of its own, as a new one would be added: configuration, plan and run, and the entry that joins them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from core.types import Phase
from planner.activations import dynamic_components, train_activation_bytes
from planner.changes import batch_changes
from planner.components import adapter_checkpoint_bytes, weight_bytes
from planner.plan import MemoryPlan, memory_plan
from planner.settings import Change, Described, PlanSettings, common_settings
from planner.shapes import load_shape
from runs.run_folder import open_run_folder
from runs.summary import FinishedRun, Report, summarise
from schemas.any_run import TrainingRunConfig
from schemas.library_settings import TRAINING_ARGUMENTS
from schemas.methods import Entry, Method
from schemas.model import ModelArgs
from schemas.values import PositiveInt

HERE = __name__
INDEX = """
run_name: ???
method: toy
output_dir: results/${run_name}
model_args: {device_map: cpu}
dataset_id_or_path: arithmetic
train_batch_size: 4
per_device_train_batch_size: auto
row_length: 64
hydra:
  output_subdir: null
"""
RUN = """# @package _global_
defaults:
  - /train_toy
  - _self_
row_length: 32
"""


@dataclass(frozen=True, kw_only=True)
class ToyRunConfig(TrainingRunConfig):
    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["toy"]
    model_args: ModelArgs
    row_length: PositiveInt
    args: Any

    @property
    def arguments(self) -> Any:
        return self.args

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return ("tiny",)


@dataclass(frozen=True, kw_only=True)
class ToySettings(PlanSettings):
    def plan(self, gpu_bytes: int | None) -> MemoryPlan:
        loaded = {"teacher": weight_bytes(self.teacher, self.precision)}
        training = dynamic_components(self, train_activation_bytes(self))
        return memory_plan(self, {Phase.LOAD: loaded, Phase.TRAIN: loaded | training}, gpu_bytes=gpu_bytes)

    def described(self) -> Described:
        return Described(
            models="a toy",
            rows=f"{self.train_batch} toy rows",
            student="none",
            reference="none",
            student_name=None,
            num_generations=1,
        )

    def changes(self) -> Iterator[Change]:
        yield from batch_changes(self)

    def written_bytes(self, num_checkpoints: int) -> float:
        return num_checkpoints * adapter_checkpoint_bytes(self)


def toy_settings(config: ToyRunConfig, *, allow_download: bool = False) -> ToySettings:
    common = common_settings(config, load_shape("tiny", allow_download=allow_download))
    return ToySettings(**common, max_prompt_len=0, max_completion_len=config.row_length)


REPORT = Report("loss", "toy loss", {})


def train_toy(
    config: ToyRunConfig, values: dict[str, Any], plan: MemoryPlan, device: Any, on_results: Callable[..., None]
) -> FinishedRun:
    folder = open_run_folder(values, config.args.output_dir, config.resume)
    folder.metrics_file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    memory = {"measured": "nothing", "phases": {}}
    finished = FinishedRun(folder=folder.path, summary=summarise(folder.path, memory, REPORT), report=REPORT)
    on_results(finished)
    return finished


TOY = Method(
    title="a toy run",
    index="train_toy",
    config=Entry(f"{HERE}:ToyRunConfig"),
    library=TRAINING_ARGUMENTS,
    arguments_field="args",
    build_arguments=Entry("transformers:TrainingArguments"),
    roles=("model",),
    rows="toy rows",
    plan_settings=Entry(f"{HERE}:toy_settings"),
    train=Entry(f"{HERE}:train_toy"),
    report=Entry(f"{HERE}:REPORT"),
    card=Entry("builtins:str"),
)
