"""Runtime types that cross package boundaries: roles of models, phases of a step."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Role of a set of weights in the run."""

    TEACHER = "teacher"
    """The policy: the base with the adapter that is trained."""
    STUDENT = "student"
    """The frozen model whose likelihood of the solution is the reward."""
    REFERENCE = "reference"
    """The frozen model that the policy is held near to by the KL term of the loss."""


class Phase(StrEnum):
    """Phase of a run: what the GPU is used for. Each has its own memory plan."""

    LOAD = "load"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class UnmappedMemory:
    """Memory that torch's counters still hold of an engine although it is not on the GPU."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
