"""The files of a collection: every candidate (parquet), the chosen ones for students (JSON lines), the dataset card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data.formats import PromptFormat
from runs.files import replaced_file
from traces.candidates import Row

ALL_FILE, CHOSEN_FILE, CARD_FILE = "traces.parquet", "traces.jsonl", "README.md"
DATASET_FILES = (ALL_FILE, CHOSEN_FILE, CARD_FILE)


def write_traces(run: Path, table: pyarrow.Table, prompt_format: PromptFormat) -> None:
    """`traces.parquet` and `traces.jsonl`, each whole or not at all."""
    with replaced_file(run / ALL_FILE) as partial:
        pyarrow.parquet.write_table(table, partial)
    with replaced_file(run / CHOSEN_FILE) as partial, open(partial, "w", encoding="utf-8") as handle:
        for row in table.to_pylist():
            if row["chosen"]:
                handle.write(json.dumps(student_row(row, prompt_format), ensure_ascii=False) + "\n")


def student_row(row: Row, prompt_format: PromptFormat) -> dict[str, Any]:
    """What a student is trained on, as columns and as the chat that they make."""
    question, solution, trace = row["question"], row["solution"], row["reasoning_trace"]
    return {
        "question": question,
        "solution": solution,
        "reasoning_trace": trace,
        "reward": row["reward"],
        "messages": prompt_format.student_messages(question, solution, trace),
    }


def rows_of(table: pyarrow.Table) -> Sequence[Row]:
    rows: list[Row] = table.to_pylist()
    return rows
