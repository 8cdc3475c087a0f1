"""Records of optimizations: a change that was made, a choice of settings, or an obstacle. Each is one of the three."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.table import Table

from core.log import log


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One value that was changed."""

    what: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Result of a function of this package; one row of `records_table`."""

    applied: ClassVar[bool] = False
    """Whether something is different now."""
    name: str
    skipped: str | None = None
    """Why nothing was done, or why a part of it was not."""

    def __str__(self) -> str:
        """One line for the log."""
        return f"{self.name}: {'; '.join(self.done())}" + (f" ({self.skipped})" if self.skipped else "")

    def done(self) -> list[str]:
        """What changed or was chosen, one line each."""
        return ["nothing changed"]

    def gives(self) -> str:
        """Bytes or time that it gives, and where the figure is from."""
        return ""

    def undo(self) -> None:
        """Put back what was there before, last change first. A second call does nothing."""


@dataclass(frozen=True, kw_only=True)
class AppliedOptimization(Record):
    """A change that was made to this process or to a model, and how it is undone."""

    applied: ClassVar[bool] = True
    changes: tuple[Change, ...]
    """At least one."""
    effect: str = ""
    """Bytes or time, and where the figure is from (predicted by the planner, measured on a GPU, not measured)."""
    undo_steps: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.changes:
            raise ValueError(f"{self.name}: a record of a change without one; an Obstacle says why nothing was done")

    def done(self) -> list[str]:
        return [str(change) for change in self.changes]

    def gives(self) -> str:
        return self.effect

    def undo(self) -> None:
        while self.undo_steps:
            self.undo_steps.pop()()


@dataclass(frozen=True, kw_only=True)
class ChosenSettings(Record):
    """Settings that are right for a run on this machine, and why. The run acts on them; nothing is different yet."""

    settings: Mapping[str, Any]
    """Key of a run configuration -> value; at least one."""
    reason: str
    """Why they were chosen, and what they give."""

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError(f"{self.name}: a choice without a setting; an Obstacle says why nothing was chosen")

    def done(self) -> list[str]:
        return [f"chosen: {key}={value}" for key, value in self.settings.items()]

    def gives(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Obstacle(Record):
    """Why nothing was done and nothing chosen."""

    skipped: str


def nothing(name: str, reason: str) -> Obstacle:
    return Obstacle(name=name, skipped=reason)


def together(name: str, parts: Sequence[Record]) -> AppliedOptimization | Obstacle:
    """One record for parts that are changes or obstacles."""
    made = [part for part in parts if isinstance(part, AppliedOptimization)]
    reasons = "; ".join(dict.fromkeys(part.skipped for part in parts if part.skipped))
    if not made:
        return nothing(name, reasons)
    return AppliedOptimization(
        name=name,
        changes=tuple(change for part in made for change in part.changes),
        effect="; ".join(part.effect for part in made if part.effect),
        skipped=reasons or None,
        undo_steps=[part.undo for part in made],
    )


def announce(record: Record) -> None:
    """Log what was done, or as a warning that nothing was; for functions that return a model, not a record."""
    log.log(logging.INFO if record.applied else logging.WARNING, "%s", record)


def undo_all(records: Sequence[Record]) -> None:
    for record in reversed(records):
        record.undo()


def records_table(records: Sequence[Record], title: str = "optimizations") -> Table:
    """One row per record: what changed or was chosen, what it gives, why it did nothing."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("", "changed or chosen", "effect", "not done, because"):
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(record.name, "\n".join(record.done()), record.gives(), record.skipped or "")
    return table
