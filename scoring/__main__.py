"""Score a file of explanations with the reward of a run.

    python -m scoring explanations.jsonl scored.jsonl --run results/teacher_rlt_tiny
    python -m scoring results/teacher_rlt_tiny/completions scored.parquet --run teacher_rlt_tiny

INPUT is a file (JSON lines, JSON, CSV, parquet) or a folder of them with the columns `question`, `solution` and
`explanation` (or the one that --column names). OUTPUT ends in .jsonl or .parquet and gets the columns of the input and
`problem`, `reward` and every term of it; a column of the same name is replaced, and the numbers of a text file come
back as the text that they were written as. A row that cannot be scored keeps its place, says why in `problem`, and has
no numbers. Exit status: 0 done, 2 the call or the input cannot work.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow
import pyarrow.parquet

from core.errors import UserError
from core.log import configure_logging, console, log
from data.sources import RawRow, read_rows
from runs.files import replaced_file
from schemas.run import ConfigError
from scoring.texts import TextScorer

_WRITERS = (".jsonl", ".parquet")

Row = dict[str, Any]


def score_file(source: str, target: Path, *, run: str, column: str, close_explanations: bool = True) -> list[Row]:
    """Read, score, write; returns the rows that were written. The file appears whole or not at all.

    Raises:
        UserError: the input cannot be read, the output cannot be written, or no row can be scored.
        ConfigError: the run's configuration is not valid any more.
    """
    _check_target(source, target)
    rows = list(read_rows(source, None, "train"))
    explanations = [raw.values.get(column) if isinstance(raw.values, dict) else None for raw in rows]
    names = list(dict.fromkeys(name for raw in rows for name in _columns(raw)))
    if column not in names:
        raise UserError(
            f"`{source}` has no explanations in a column `{column}` (the columns are {', '.join(names) or 'none'})",
            expected="the columns question, solution and explanation",
            remedy="--column NAME, where the explanations have another name",
        )
    with TextScorer(run) as scorer:
        scored = scorer.score_rows(rows, explanations, close_explanations=close_explanations)
    table = []
    for raw, row in zip(rows, scored, strict=True):
        row[column] = row.pop("explanation")
        table.append(dict.fromkeys(names) | _columns(raw) | row)
    _write(table, target)
    return table


def _columns(raw: RawRow) -> Row:
    return raw.values if isinstance(raw.values, dict) else {}


def _check_target(source: str, target: Path) -> None:
    if target.suffix not in _WRITERS:
        problem = f"the ending `{target.suffix}`"
    elif target.resolve() == Path(source).expanduser().resolve():
        problem = "the input itself"
    elif not target.absolute().parent.is_dir():
        problem = f"a file in `{target.parent}`, which is no folder"
    elif target.is_dir() or not os.access(target.absolute().parent, os.W_OK):
        problem = "a folder" if target.is_dir() else f"a file in `{target.parent}`, which cannot be written"
    else:
        return
    raise UserError(
        f"the output `{target}` is {problem}" if target.suffix in _WRITERS else f"the output `{target}` has {problem}",
        expected=f"a file that ends in {' or '.join(_WRITERS)}, in a folder that is there and can be written",
        remedy="give another OUTPUT",
    )


def _write(table: list[Row], target: Path) -> None:
    with replaced_file(target) as partial:
        if target.suffix == ".jsonl":
            partial.write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), partial)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument(
        "--run", required=True, help="folder of a run, or a run configuration (its teacher is the base)"
    )
    parser.add_argument("--column", default="explanation", help="where the explanations are (default: %(default)s)")
    parser.add_argument(
        "--keep-open", action="store_true", help="a text without closing tag was cut off: leave it open"
    )
    arguments = parser.parse_args(words)
    configure_logging()
    try:
        table = score_file(
            arguments.input,
            arguments.output,
            run=arguments.run,
            column=arguments.column,
            close_explanations=not arguments.keep_open,
        )
    except (UserError, ConfigError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    rewards = [row["reward"] for row in table if row["problem"] is None]
    log.info("%d of %d rows scored, mean reward %.3f: %s", len(rewards), len(table), mean(rewards), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
