"""What an optimisation did: the answer of the functions of this package that apply one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from core.log import log


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that is now different."""

    what: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after}"


@dataclass(kw_only=True)
class AppliedOptimization:
    """One optimisation of this process, a model or a configuration."""

    name: str
    changes: tuple[Change, ...] = ()
    """Empty where nothing was done."""
    effect: str = ""
    """Bytes or time, and where the figure is from (predicted by the planner, measured on a card, not measured)."""
    skipped: str | None = None
    """Why nothing was done, or why a part of it was not."""
    undo_steps: list[Callable[[], object]] = field(default_factory=list, repr=False)

    @property
    def applied(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        """One line for the log."""
        done = "; ".join(str(change) for change in self.changes) or "nothing changed"
        return f"{self.name}: {done}" + (f" ({self.skipped})" if self.skipped else "")

    def undo(self) -> None:
        """Put back what was there before, last change first. A second call does nothing."""
        while self.undo_steps:
            self.undo_steps.pop()()

    @property
    def settings(self) -> dict[str, Any]:
        """The changes as settings of a run: key -> new value."""
        return {change.what: change.after for change in self.changes}


def nothing(name: str, reason: str) -> AppliedOptimization:
    return AppliedOptimization(name=name, skipped=reason)


def announce(record: AppliedOptimization) -> None:
    """Log what was done, or as a warning that nothing was; for functions that answer with a model, not a record."""
    log.log(logging.INFO if record.applied else logging.WARNING, "%s", record)


def undo_all(records: Sequence[AppliedOptimization]) -> None:
    for record in reversed(records):
        record.undo()


def records_table(records: Sequence[AppliedOptimization], title: str = "optimisations") -> Table:
    """One row a record: what changed, what it gives, why it did nothing."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("", "changed", "effect", "not done, because"):
        table.add_column(column, overflow="fold")
    for record in records:
        changes = "\n".join(str(change) for change in record.changes) or "nothing"
        table.add_row(record.name, changes, record.effect, record.skipped or "")
    return table
