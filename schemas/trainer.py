"""Settings of the run that TRL and transformers do not declare."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from schemas.model import PositiveInt


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    train_batch_size: PositiveInt
    """Rows per optimizer step (a teacher's: prompts x `num_generations`); gradient accumulation follows from it."""
    resume: str = "auto"
    """`auto` continues an unfinished run of the same configuration in `output_dir` from its newest whole checkpoint,
    `never` starts anew, anything else is the checkpoint folder to continue from, in `output_dir`. Another run that lies
    there is kept beside it."""
    card_gb: Annotated[float, Field(gt=0)] = 85.0
    """Decimal GB of the GPU that the run configuration is for: what is planned for where no GPU is found."""
    gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """Plan for a GPU of this many decimal GB instead of the one that is found."""
    allow_oversubscription: bool = False
    """Start although the memory plan exceeds the GPU."""
    max_growth_warnings: Annotated[int, Field(ge=0)] = 3
    """How often the watchdog may warn that memory grows from step to step."""
    max_oom_retries: Annotated[int, Field(ge=0)] = 3
    """How often each phase (generate, score, train) may run out of memory: every time the same work is repeated with
    half as much at once, and so from then on. 0: the first time ends the run."""


@dataclass(frozen=True, kw_only=True)
class TeacherStepConfig:
    """A teacher's training step."""

    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens of one forward and backward, prompts and padding counted; rows of like length go together. `auto`:
    per_device_train_batch_size x (max_prompt_length + max_completion_length)."""
