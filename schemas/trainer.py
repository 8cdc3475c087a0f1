"""Settings of the run that TRL and transformers do not declare."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from schemas.values import CountingInt, Gigabytes, Name, PositiveInt


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What a run of any method may use of a machine, and where it goes on."""

    resume: Name = "auto"
    """`auto` continues an unfinished run of the same configuration in `output_dir` from its newest whole checkpoint,
    `never` starts anew, anything else is the checkpoint folder to continue from, in `output_dir`. Another run that lies
    there is kept beside it."""
    card_gb: Gigabytes = 85.0
    """Decimal GB of the GPU that the run configuration is for: what is planned for where no GPU is found."""
    gpu_gb: Gigabytes | None = None
    """Plan for a GPU of this many decimal GB instead of the one that is found."""
    allow_oversubscription: bool = False
    """Start although the memory plan exceeds the GPU."""
    max_oom_retries: CountingInt = 3
    """How often each phase (generate, score, train) may run out of memory: every time the same work is repeated with
    half as much at once, and so from then on. 0: the first time ends the run."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What every training has."""

    train_batch_size: Annotated[int, Field(ge=1, le=2**20)]
    """Rows per optimizer step (a teacher's: prompts x `num_generations`); gradient accumulation follows from it."""
    max_growth_warnings: CountingInt = 3
    """How often the watchdog may warn that memory grows from step to step."""


@dataclass(frozen=True, kw_only=True)
class TeacherStepConfig:
    """A teacher's training step."""

    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens of one forward and backward, prompts and padding counted; rows of like length go together. `auto`:
    per_device_train_batch_size x (max_prompt_length + max_completion_length)."""
