"""Raw rows of a dataset on disk or on the hub, each with the place that a message can name."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from core.errors import UserError

_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True, slots=True)
class RawRow:
    place: str
    """E.g. `questions.jsonl line 3`."""
    values: Any
    problem: str | None = None
    """Why the row could not even be read."""


def read_rows(dataset_id_or_path: str, config_name: str | None, split: str) -> Iterator[RawRow]:
    """Rows of a file (.jsonl, .json, .csv, .parquet), a folder of such files, a `save_to_disk` folder or a hub dataset.

    `split` selects on the hub, in a saved `DatasetDict`, and among files of a folder that are named after splits.

    Raises:
        UserError: there is no such dataset, or it cannot be read.
    """
    path = Path(dataset_id_or_path).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix in _READERS or path.is_absolute() or dataset_id_or_path.startswith((".", "~")):
        raise UserError(
            f"there is no dataset `{dataset_id_or_path}`",
            expected="a file (.jsonl, .json, .csv, .parquet), a folder, or the id of a hub dataset",
            remedy=f"check dataset_id_or_path (the current folder is {Path.cwd()})",
        )
    return _read_hub(dataset_id_or_path, config_name, split)


def _read_file(path: Path) -> Iterator[RawRow]:
    if path.suffix not in _READERS:
        raise UserError(
            f"`{path}` has the ending `{path.suffix}`", expected=", ".join(_READERS), remedy="convert the file"
        )
    try:
        yield from _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"`{path}` cannot be read: {error}", expected=f"a valid {path.suffix} file in UTF-8", remedy="mend the file"
        ) from error


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                yield RawRow(place, json.loads(line))
            except json.JSONDecodeError as error:
                yield RawRow(place, None, problem=f"is not JSON ({error})")


def _read_json(path: Path) -> Iterator[RawRow]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise UserError(
            f"`{path}` holds a JSON {type(rows).__name__}",
            expected="a list of objects, one for each question",
            remedy="write a list, or one object a line into a .jsonl file",
        )
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{path.name} row {number}", values)


def _read_csv(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, values in enumerate(csv.DictReader(lines), start=1):
            yield RawRow(f"{path.name} row {number}", values)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield RawRow(f"{path.name} row {number}", values)


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(path: Path, split: str) -> Iterator[RawRow]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _read_saved(path, split)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
    named = {file: name for file in files for name in _SPLIT_NAMES if name in re.split(r"[^a-z]+", file.stem.lower())}
    if named:
        files = [file for file in files if named.get(file) == split]
        if not files:
            raise _no_split(str(path), split, sorted(set(named.values())))
    if not files:
        raise UserError(
            f"the folder `{path}` holds no data file",
            expected=f"files that end in {', '.join(_READERS)}, or a folder written by `Dataset.save_to_disk`",
            remedy="check dataset_id_or_path",
        )
    for file in files:
        yield from _read_file(file)


def _read_saved(path: Path, split: str) -> Iterator[RawRow]:
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"the saved dataset `{path}` cannot be read: {error}",
            expected="a whole folder written by `save_to_disk`",
            remedy="write it again",
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise _no_split(str(path), split, list(saved))
        saved = saved[split]
    for number, values in enumerate(saved, start=1):
        yield RawRow(f"row {number}", values)


def _read_hub(dataset_id: str, config_name: str | None, split: str) -> Iterator[RawRow]:
    try:
        dataset = load_dataset(dataset_id, config_name, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(
            f"the hub dataset `{dataset_id}` (config {config_name}, split {split}) cannot be loaded: {error}",
            expected="the id of a dataset that this machine can reach or has in its cache, or a local file or folder",
            remedy="check dataset_id_or_path, dataset_config_name, dataset_split and the network",
        ) from error
    for number, values in enumerate(dataset, start=1):
        yield RawRow(f"row {number}", values)


def _no_split(name: str, split: str, splits: list[str]) -> UserError:
    return UserError(
        f"`{name}` has no split `{split}`",
        expected=f"one of {', '.join(splits)}",
        remedy="set dataset_split",
    )
