"""Chunks: the questions that are collected together, each chunk a file that appears whole or not at all.

A trace follows from (seed, row, sample) and the teacher, so a missing chunk is made again as it would have been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from core.errors import UserError
from core.log import log
from generation.policy import TRACE_STREAM
from runs.files import replaced_file, sync_folder

CHUNKS_FOLDER = "chunks"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Questions `start` to `stop` (half-open) of the dataset."""

    number: int
    start: int
    stop: int

    def file(self, run: Path) -> Path:
        return run / CHUNKS_FOLDER / f"chunk_{self.number:06d}.parquet"


def split(num_questions: int, size: int) -> list[Chunk]:
    starts = range(0, num_questions, size)
    return [Chunk(number, start, min(start + size, num_questions)) for number, start in enumerate(starts)]


def trace_seeds(seed: int, rows: Sequence[int], num_samples: int) -> list[int]:
    """One 32-bit seed for each sample of each row, prompt-major, from (seed, row, sample) alone."""
    return [
        int(np.random.SeedSequence([seed, TRACE_STREAM, row, sample]).generate_state(1)[0])
        for row in rows
        for sample in range(num_samples)
    ]


def write_chunk(chunk: Chunk, run: Path, table: list[dict[str, Any]]) -> None:
    file = chunk.file(run)
    file.parent.mkdir(exist_ok=True)
    with replaced_file(file) as partial:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), partial)
    sync_folder(file.parent)


def finished(chunks: Sequence[Chunk], run: Path, questions: Sequence[str], num_samples: int) -> Iterator[Chunk]:
    """The chunks that an earlier process has finished; what a broken disk has damaged is collected again.

    Raises:
        UserError: one holds other questions: the data have changed since.
    """
    for chunk in chunks:
        if not chunk.file(run).is_file():
            continue
        try:
            found = pyarrow.parquet.read_table(chunk.file(run), columns=["question"]).column("question").to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            log.warning("%s is damaged and is collected again (%s)", chunk.file(run), error)
            continue
        if found != [question for question in questions[chunk.start : chunk.stop] for _ in range(num_samples)]:
            raise UserError(
                f"{chunk.file(run)} holds traces of other questions",
                expected="the dataset as it was when the collection began",
                remedy="put the data back, or start anew with resume=never",
            )
        yield chunk


def read_chunks(chunks: Sequence[Chunk], run: Path) -> pyarrow.Table:
    return pyarrow.concat_tables(
        [pyarrow.parquet.read_table(chunk.file(run)) for chunk in chunks], promote_options="permissive"
    )
