"""Figures of GPUs in the docs: docs/measurements.json holds them, docs/measurements.md and README.md show them.

`python -m benchmarks.gpu.report` writes both pages anew from the file; `--add FOLDER` takes in the results of a GPU on
another machine, which lie in its --out folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runner import Result, write_whole
from core.log import console
from core.marked_block import with_block
from planner import readme_table

PUBLISHED_SHAPE = "7B"
"""What the configurations of parts a and d are made for; figures of other shapes stay where they were measured."""
START, END = "<!-- measured on a GPU -->", "<!-- /measured on a GPU -->"


def publish(results: Sequence[Result], root: Path = ROOT) -> None:
    """Add results to docs/measurements.json and write the pages.

    A cell that is measured again on the same GPU with the same versions replaces its earlier figures; figures of
    other GPUs and versions stay.
    """
    file = root / "docs" / "measurements.json"
    new = [_published(result) for result in results if result.status == "ok"]
    keys = {_key(entry) for entry in new}
    entries = [entry for entry in json.loads(file.read_text(encoding="utf-8")) if _key(entry) not in keys] + new
    write_whole(file, json.dumps(entries, indent=1) + "\n")
    write_pages(root)


def results_in(folder: Path) -> list[Result]:
    """Results of a GPU in an --out folder, of the shape that the configurations are made for."""
    results = [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("?-*.json"))]
    return [result for result in results if result.machine["card"] is not None and result.shape == PUBLISHED_SHAPE]


def _published(result: Result) -> dict[str, Any]:
    entry = asdict(result)
    figures = entry.pop("figures")
    kept = {key: figures[key] for key in ("tables", "config", "card_gb", "peaks_gb", "rates") if key in figures}
    return {key: entry[key] for key in ("part", "cell", "shape", "date", "command", "machine")} | kept


def _key(entry: dict[str, Any]) -> str:
    machine = entry["machine"]
    return json.dumps([entry["part"], entry["cell"], entry["shape"], _setting(machine)])


def _setting(machine: dict[str, Any]) -> str:
    """GPU, driver and versions in words: figures under one such heading may be compared."""
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    card = f"{machine['card']} ({machine['card_gb']} GB), driver {machine['driver']}"
    return f"{card}, Python {machine['python']}, {versions}"


def section(entries: Sequence[dict[str, Any]]) -> str:
    """The part of docs/measurements.md between the markers."""
    if not entries:
        rows = [f"| {part.letter} | {part.question} | not measured |" for part in PARTS.values()]
        return "\n".join(["| part | question | result |", "|---|---|---|", *rows])
    lines = []
    for setting in sorted({_setting(entry["machine"]) for entry in entries}):
        lines += [f"### {setting}", ""]
        measured = [entry for entry in entries if _setting(entry["machine"]) == setting]
        for letter, part in PARTS.items():
            lines += [f"**{letter}. {part.question}**", ""]
            mine = [entry for entry in measured if entry["part"] == letter]
            lines += [line for entry in mine for line in _tables(entry)] or ["Not measured.", ""]
    return "\n".join(lines).rstrip()


def _tables(entry: dict[str, Any]) -> list[str]:
    commit = entry["machine"]["commit"] or entry["machine"]["sources"]
    lines = [f"{entry['cell']}: {entry['date']}, commit {commit}, `{entry['command']}`", ""]
    for table in entry["tables"]:
        lines += [f"{table['title']}:", "", _row(table["columns"]), _row(["---"] * len(table["columns"]))]
        lines += [*(_row(row) for row in table["rows"]), ""]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_section(page: str, entries: Sequence[dict[str, Any]]) -> str:
    """docs/measurements.md with the figures of these entries."""
    return with_block(page, section(entries), start=START, end=END)


def write_pages(root: Path = ROOT) -> None:
    measurements = root / "docs" / "measurements.json"
    page, readme = root / "docs" / "measurements.md", root / "README.md"
    page.write_text(
        with_section(page.read_text(encoding="utf-8"), json.loads(measurements.read_text(encoding="utf-8")))
    )
    readme.write_text(
        with_block(
            readme.read_text(encoding="utf-8"),
            readme_table.table(measurements),
            start=readme_table.START,
            end=readme_table.END,
        )
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; status 1 where docs/measurements.md is stale"
    )
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="results to take in")
    arguments = parser.parse_args(words)
    if not arguments.check:
        publish(results_in(arguments.add) if arguments.add else [])
        return 0
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    stale = page != with_section(page, json.loads((ROOT / "docs" / "measurements.json").read_text(encoding="utf-8")))
    if stale:
        console.print("docs/measurements.md is out of date; run python -m benchmarks.gpu.report")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
