"""What was tried, what survived and what was lost, as a table and as JSON lines that several runs add up in.

python -m tests.campaign.tally results/campaign.jsonl     the sum of all runs in the file
"""

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Tally:
    """Counts of one campaign: a fault that was put in is tried, and survived unless a problem was found after it."""

    name: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """What was lost, with all that is needed to try it again."""
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    """Why nothing could be tried here."""
    start_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def count(self, what: str, problems: Sequence[str], *, tried: int = 1) -> None:
        with self._lock:
            self.tried += tried
            if problems:
                self.lost.append(f"{what}: " + "; ".join(problems))

    def record(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.start_s, 1)
        figures = {"campaign": self.name, "tried": self.tried, "lost": len(self.lost), "seconds": seconds}
        return figures | {"losses": self.lost, "notes": self.notes, "skipped": self.skipped}


def append_record(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        handle.write(json.dumps(record) + "\n")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs of one campaign, added up."""

    name: str
    tried: int
    lost: int
    minutes: float
    note: str

    @property
    def cells(self) -> tuple[str, ...]:
        survived = self.tried - self.lost
        return (self.name, str(self.tried), str(survived), str(self.lost), f"{self.minutes:.1f}", self.note)


_COLUMNS = ("campaign", "tried", "survived", "lost", "minutes", "")
_BEGIN, _END = "<!-- figures of the campaign: python -m tests.campaign.tally --write -->", "<!-- end of the figures -->"
_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def added_up(records: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(record["campaign"] for record in records):
        same = [record for record in records if record["campaign"] == name]
        notes = [*(f"{k} {v}" for k, v in same[-1]["notes"].items()), same[-1]["skipped"]]
        rows.append(
            Row(
                name=name,
                tried=sum(record["tried"] for record in same),
                lost=sum(record["lost"] for record in same),
                minutes=sum(record["seconds"] for record in same) / 60,
                note=", ".join(filter(None, notes)),
            )
        )
    return rows


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="fault campaign", title_justify="left")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if 1 <= i <= 4 else "left")
    for row in added_up(records):
        table.add_row(*row.cells)
    return table


def write_page(records: Sequence[dict[str, Any]], page: Path = _PAGE) -> None:
    """Put the figures of these runs into the documentation."""
    dates = sorted({record["date"] for record in records})
    facts = [f"{record['commit']} (seed {record['seed']}, scale {record['scale']:g})" for record in records]
    lines = [
        f"Runs of {' and '.join(dict.fromkeys((dates[0], dates[-1])))}, commits {', '.join(dict.fromkeys(facts))}:",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|--:|--:|--:|--:|---|",
        *("| " + " | ".join(row.cells) + " |" for row in added_up(records)),
    ]
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"{page} does not hold the lines {_BEGIN} and {_END}")
    page.write_text(f"{before}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if word != "--write"]
    all_records = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    if "--write" in sys.argv:
        write_page(all_records)
    Console().print(table_of(all_records))
