"""Raw rows of a dataset on disk or on the hub, each with its place for messages."""

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from core.errors import UserError
from core.hub import can_be_on_hub

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second: imported where a dataset of its own kind is read

_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")
_DATASETS_OWN_FILES = ("dataset_info.json", "dataset_infos.json")
_NUM_ENDINGS_SHOWN = 5
_BATCH_ROWS = 1024
_MAX_FILES = 20_000

_parse_json = partial(json.loads, parse_int=str, parse_float=str)
"""Numbers stay as they are written: `42.0` and `42` are different solutions for a student."""


@dataclass(frozen=True, slots=True)
class RawRow:
    place: str
    """E.g. `questions.jsonl line 3`."""
    values: Any
    problem: str | None = None
    """Why the row could not even be read."""


def read_rows(dataset_id_or_path: str, config_name: str | None, split: str) -> Iterator[RawRow]:
    """Rows of a file (.jsonl, .json, .csv, .tsv, each maybe with .gz; .parquet), a folder of such files, a
    `save_to_disk` folder or a hub dataset.

    `split` selects on the hub, in a saved `DatasetDict`, and among files of a folder that are named after splits.

    Raises:
        UserError: there is no such dataset, or it cannot be read.
    """
    check_dataset_path(dataset_id_or_path)
    path = Path(dataset_id_or_path).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    return _read_hub(dataset_id_or_path, config_name, split)


def check_dataset_path(dataset_id_or_path: str) -> None:
    """Refuse a local dataset that is missing or of a kind that is not read.

    Raises:
        UserError: the name is that of a local file or folder, and there is none, or a file of a kind that is not read;
            or nothing on the hub can be called so.
    """
    path = Path(dataset_id_or_path).expanduser()
    ending = _ending(path)
    if path.is_file() and ending not in _READERS:
        raise UserError(f"`{path}` has the ending `{ending}`", expected=_ENDINGS, remedy="convert the file")
    if path.is_file() or path.is_dir():
        return
    is_local = ending in _READERS or path.is_absolute() or dataset_id_or_path.startswith((".", "~"))
    if is_local or path.exists() or not can_be_on_hub(dataset_id_or_path):
        raise UserError(
            f"there is no dataset `{dataset_id_or_path}`",
            expected=f"a file ({_ENDINGS}), a folder, or the id of a hub dataset",
            remedy=f"check dataset_id_or_path (the current folder is {Path.cwd()})",
        )


def _ending(path: Path) -> str:
    """`.jsonl` and `.jsonl.gz` alike; of an unreadable kind with what is before its `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return "".join(suffixes[-2:])
    return suffixes[-1] if suffixes else ""


_UNREADABLE = (
    *(OSError, EOFError, zlib.error, UnicodeDecodeError),
    *(csv.Error, json.JSONDecodeError, pyarrow.ArrowException),
)


def _read_file(path: Path) -> Iterator[RawRow]:
    ending = _ending(path)
    try:
        yield from _READERS[ending](path)
    except _UNREADABLE as error:
        raise UserError(
            f"`{path}` cannot be read: {error}", expected=f"a valid {ending} file in UTF-8", remedy="mend the file"
        ) from error


def _open_text(path: Path) -> IO[str]:
    """A text file in UTF-8, with or without a byte-order mark, packed by gzip or not; line ends as they are."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                yield RawRow(place, _parse_json(line))
            except json.JSONDecodeError as error:
                yield RawRow(place, None, problem=f"is not JSON ({error})")


def _read_json(path: Path) -> Iterator[RawRow]:
    """A list of objects, or JSON lines under this ending."""
    if _begins_with_a_line_of_json(path):
        yield from _read_jsonl(path)
        return
    with _open_text(path) as file:
        rows = _parse_json(file.read())
    if not isinstance(rows, list):
        raise UserError(
            f"`{path}` holds one JSON {type(rows).__name__}",
            expected="a list of objects, one for each question, or one object a line",
            remedy="write a list, or one object a line",
        )
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{path.name} row {number}", values)


def _begins_with_a_line_of_json(path: Path) -> bool:
    with _open_text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(_parse_json(first), dict)
    except json.JSONDecodeError:
        return False


def _read_separated(path: Path, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # its default is less than a long trace
    with _open_text(path) as lines:
        number = 0
        try:
            for number, values in enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True), start=1):
                num_extra = len(values.pop(None, []))
                problem = f"has {num_extra} more fields than the header: quote those that hold a separator"
                yield RawRow(f"{path.name} row {number}", values, problem if num_extra else None)
        except csv.Error as error:
            raise csv.Error(f"row {number + 1}: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    return _arrow_rows(pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH_ROWS), f"{path.name} ")


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], place: str = "") -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for i, field in enumerate(batch.schema):
            if pyarrow.types.is_float32(field.type):  # 0.1 and not 0.10000000149011612
                shortest = batch.column(i).cast(pyarrow.string()).cast(pyarrow.float64())
                batch = batch.set_column(i, field.name, shortest)
        for values in batch.to_pylist():
            number += 1
            yield RawRow(f"{place}row {number}", values)


_TEXT_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_separated, delimiter=","),
    ".tsv": partial(_read_separated, delimiter="\t"),
}
_READERS = {
    **_TEXT_READERS,
    **{f"{ending}.gz": reader for ending, reader in _TEXT_READERS.items()},
    ".parquet": _read_parquet,
}
_ENDINGS = f"{', '.join(_TEXT_READERS)}, each also as .gz, or .parquet"


def _read_folder(path: Path, split: str) -> Iterator[RawRow]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _read_saved(path, split)
        return
    found = _files_below(path)
    files = [file for file in found if _ending(file) in _READERS and file.name not in _DATASETS_OWN_FILES]
    named = {file: name for file in files for name in _SPLIT_NAMES if name in re.split(r"[^a-z]+", file.stem.lower())}
    if named:
        files = [file for file in files if named.get(file) == split]
        if not files:
            raise _no_split(str(path), split, sorted(set(named.values())))
    if not files:
        raise UserError(
            f"the folder `{path}` holds no data file, but {_content(found)}",
            expected=f"files that end in {_ENDINGS}, or a folder written by `Dataset.save_to_disk`",
            remedy="check dataset_id_or_path",
        )
    for file in files:
        yield from _read_file(file)


def _files_below(folder: Path) -> list[Path]:
    """All but the hidden ones, in order.

    Raises:
        UserError: there are too many for a dataset (`/`, say), or a folder among them cannot be read.
    """
    found: list[Path] = []
    try:
        for file in folder.rglob("*"):
            if not _is_hidden(file.relative_to(folder)) and file.is_file():
                found.append(file)
            if len(found) > _MAX_FILES:
                break
        else:
            return sorted(found)
        problem = f"holds more than {_MAX_FILES} files"
    except OSError as error:
        problem = f"cannot be read: {error}"
    raise UserError(
        f"the folder `{folder}` {problem}", expected="a folder of data files", remedy="check dataset_id_or_path"
    )


def _is_hidden(path: Path) -> bool:
    """E.g. what a download leaves in `.cache`."""
    return any(part.startswith(".") for part in path.parts)


def _content(files: list[Path]) -> str:
    """`3 .tar.gz, 1 .md`: what a folder holds, by ending."""
    endings = Counter(_ending(file) or "without an ending" for file in files).most_common()
    shown = [f"{count} {ending}" for ending, count in endings[:_NUM_ENDINGS_SHOWN]]
    return ", ".join([*shown, *(["others"] if len(endings) > len(shown) else [])]) or "nothing at all"


def _read_saved(path: Path, split: str) -> Iterator[RawRow]:
    from datasets import DatasetDict, load_from_disk

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
    yield from _dataset_rows(saved)


def _read_hub(dataset_id: str, config_name: str | None, split: str) -> Iterator[RawRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        dataset = load_dataset(dataset_id, config_name, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(
            f"the hub dataset `{dataset_id}` (config {config_name}, split {split}) cannot be loaded: {error}",
            expected="the id of a dataset that this machine can reach or has in its cache, or a local file or folder",
            remedy="check dataset_id_or_path, dataset_config_name, dataset_split and the network",
        ) from error
    yield from _dataset_rows(dataset)


def _dataset_rows(dataset: "Dataset") -> Iterator[RawRow]:
    """Straight from Arrow, so that columns of images or sound are not decoded."""
    return _arrow_rows(dataset.with_format("arrow").iter(_BATCH_ROWS))


def _no_split(name: str, split: str, splits: list[str]) -> UserError:
    return UserError(
        f"`{name}` has no split `{split}`",
        expected=f"one of {', '.join(splits)}",
        remedy="set dataset_split",
    )
