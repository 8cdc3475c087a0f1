"""Runtime types that cross package boundaries. Letters: P prompts, G generations per prompt, B = P*G rows, T tokens."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """Who a set of weights is in the run."""

    TEACHER = "teacher"
    """The policy: the base with the adapter that is trained."""
    STUDENT = "student"
    """The frozen model whose likelihood of the solution is the reward."""
    REFERENCE = "reference"
    """The frozen model that the policy is held near to by the KL term of the loss."""


class Phase(StrEnum):
    """What the card is being used for. Each phase has its own memory plan."""

    LOAD = "load"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    SYNC = "sync"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled row, e.g. `Completion(token_ids=[7, 9, 2], logprobs=[-0.1, -1.2, -0.3], finish_reason="stop")`."""

    token_ids: list[int]
    """[T] sampled ids, the stop id included where one was sampled."""
    logprobs: list[float]
    """[T] log-prob of each sampled id under the sampling distribution (temperature applied), in nats."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRow:
    """Token ids and the spans in them whose log-probs are wanted. Spans are half-open `(start, end)` and start >= 1."""

    token_ids: list[int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class UnmappedMemory:
    """What torch's memory counters still hold of an engine although it is not on the card."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
