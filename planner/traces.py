"""The plan of a collection of traces: the GENERATE and SCORE phases of a teacher's run, with nothing to train."""

from dataclasses import dataclass, replace

from planner.settings import Described
from planner.teacher import TeacherSettings, sampled_settings
from schemas.traces import TracesRunConfig

_BYTES_PER_TOKEN = 5
"""Of a text on disk, generously."""


@dataclass(frozen=True, kw_only=True)
class TracesSettings(TeacherSettings):
    """One collection; rows are explanations, `train_batch` those of a chunk."""

    num_questions: int | None
    """None: as many as the dataset has."""

    def described(self) -> Described:
        of_a_teacher = super().described()
        return replace(
            of_a_teacher, rows=f"{self.train_batch} explanations a chunk, {self.num_generations} per question"
        )

    def written_bytes(self, num_checkpoints: int) -> float:
        """The traces twice, in chunks and as one file, where their number is known; and an export for a generator."""
        num_rows = (self.num_questions or 0) * self.num_generations
        return super().written_bytes(0) + 2.0 * _BYTES_PER_TOKEN * num_rows * self.row_len


def traces_settings(config: TracesRunConfig, *, allow_download: bool = False) -> TracesSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: a model's shape is not known (`planner.shapes.load_shape`).
    """
    return TracesSettings(
        **sampled_settings(config, allow_download=allow_download),
        reference="none",
        micro_batch=1,
        train_batch=config.questions_per_chunk * config.num_samples,
        num_generations=config.num_samples,
        num_questions=config.num_questions,
        num_steps=None if config.num_questions is None else -(-config.num_questions // config.questions_per_chunk),
    )
