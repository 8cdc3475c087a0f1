"""Runtime types that cross package boundaries: roles of models, phases of a step."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Who a set of weights is in the run."""

    TEACHER = "teacher"
    """The policy: the base with the adapter that is trained."""
    STUDENT = "student"
    """The frozen model whose likelihood of the solution is the reward."""
    REFERENCE = "reference"
    """The frozen model that the policy is held near to by the KL term of the loss."""


class Phase(StrEnum):
    """What the GPU is being used for. Each phase has its own memory plan."""

    LOAD = "load"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class UnmappedMemory:
    """What torch's memory counters still hold of an engine although it is not on the GPU."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
