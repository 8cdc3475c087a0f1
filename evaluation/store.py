"""SampleStore: answers that are sampled and judged, kept chunk by chunk until the evaluation is whole."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from models.trained import StoredModel
from runs.run_folder import write_table

SAMPLES_FILE, EVALUATION_FILE = "samples.parquet", "evaluation.json"
_CHUNKS_FOLDER = "samples"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json")
Table = Mapping[str, list[Any]]


class SampleStore:
    """A folder for each model with a file for each chunk of questions, written whole or not at all.

    A chunk is keyed by its questions and by the model's files as they are: one that was trained again is sampled anew.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / _CHUNKS_FOLDER

    def has(self, model: StoredModel, number: int, questions: range) -> bool:
        return self._file(model, number, questions).is_file()

    def save(self, model: StoredModel, number: int, questions: range, table: Table) -> None:
        file = self._file(model, number, questions)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, table)

    def load(self, model: StoredModel, number: int, chunks: list[range]) -> pd.DataFrame:
        """All answers of one model, in the order of the questions."""
        return pd.concat([pd.read_parquet(self._file(model, number, chunk)) for chunk in chunks], ignore_index=True)

    def finish(self, samples: pd.DataFrame) -> None:
        """Write one table of all models' answers."""
        write_table(self._run_dir / SAMPLES_FILE, {str(name): list(column) for name, column in samples.items()})

    def remove_chunks(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, model: StoredModel, number: int, questions: range) -> Path:
        name = re.sub(r"[^\w.-]+", "_", model.name)[-80:]
        folder = f"{number:02d}-{name}-{fingerprint(model)}"
        return self._folder / folder / f"questions_{questions.start:06d}-{questions.stop - 1:06d}.parquet"


def fingerprint(model: StoredModel) -> str:
    """Of the sizes and times of a local model's files; of a hub id, of its name."""
    digest = hashlib.sha256(f"{model.weights} {model.adapter}".encode())
    for file in _files(model):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _files(model: StoredModel) -> Iterator[Path]:
    for folder in (model.adapter, Path(model.weights).expanduser()):
        if folder is not None and folder.is_dir():
            for pattern in _WEIGHTS:
                yield from sorted(folder.glob(pattern))
