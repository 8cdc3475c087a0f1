"""A disk that is full or cannot be written ends a run with one message; earlier checkpoints stay, and it goes on."""

import contextlib
import errno
import importlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models.export as export
from core.errors import StoppedError
from core.faults import disk_fault, is_disk_full
from schemas.compose import compose_run_config
from tests.helpers.planted_outliers import load_quantised, word_tokenizer, write_planted_model
from tests.helpers.tiny_run import SMALL, write_random_model
from trainers.start import train_runs

RUN = ("max_steps=3", "save_steps=1", "eval_steps=2", "eval_on_start=false")


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond that, whoever writes it (EFBIG; Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk_at(monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """Let one call of a function, `module:name`, write 100 bytes and no more."""
    module, _, names = where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def limited(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        with files_of_at_most(100) if len(calls) == call else contextlib.nullcontext():
            return original(*args, **keywords)

    monkeypatch.setattr(owner, name, limited)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


def values_of(model: Path, folder: Path) -> dict[str, Any]:
    named = [f"model_name_or_path={model}", f"student_model={model}", f"output_dir={folder}"]
    return compose_run_config("teacher_rlt_tiny", [*named, *SMALL, *RUN])


WRITERS = {
    "checkpoint": ("peft:PeftModel.save_pretrained", 2),
    "optimizer": ("transformers.trainer:Trainer._save_optimizer_and_scheduler", 2),
    "metrics": ("trainers.callbacks:append_metrics", 3),
    "completions": ("pandas:DataFrame.to_parquet", 4),
    "evaluation": ("trainers.teacher_grpo:write_evaluation", 1),
    "result": ("peft:PeftModel.save_pretrained", 4),
    "summary": ("runs.summary:write_summary", 1),
}


@pytest.mark.parametrize(
    "writer", [pytest.param(name, marks=() if name == "checkpoint" else pytest.mark.slow) for name in WRITERS]
)
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(writer, model, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_disk_at(patch, *WRITERS[writer])
        with pytest.raises(StoppedError) as stopped:
            list(train_runs([values_of(model, folder)]))
    message = str(stopped.value)
    assert message.startswith("a disk is full") and "free: output_dir" in message and "make room" in message
    left = max(folder.glob("checkpoint-*"))
    assert f"the same command continues from {left}" in message
    assert torch.load(left / "optimizer.pt", weights_only=True)["state"]
    assert not (folder / ".saving").exists() and not (folder / "summary.json").exists()

    (finished,) = train_runs([values_of(model, folder)])
    assert finished.summary["steps"] == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


# The parts


def of_torch_save(folder: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, folder / "file")


def of_safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(1000)}, folder / "file")


def of_parquet(folder: Path) -> None:
    import pandas as pd

    pd.DataFrame({"a": [f"text {i}" for i in range(1000)]}).to_parquet(folder / "file")


def of_text(folder: Path) -> None:
    (folder / "file").write_text("a" * 1000)


@pytest.mark.parametrize("write", [of_torch_save, of_safetensors, of_parquet, of_text])
def test_every_library_is_understood(write: Callable[[Path], None], tmp_path):
    with files_of_at_most(100), pytest.raises(Exception) as raised:
        write(tmp_path)
    assert is_disk_full(raised.value)
    assert disk_fault(raised.value).startswith("a disk is full")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "a disk is full (/a/file)"),
        (errno.EDQUOT, "a disk is full"),
        (errno.EROFS, "a disk is read-only (/a/file)"),
        (errno.EACCES, "access is denied"),
        (errno.EIO, "a disk does not answer"),
    ],
)
def test_what_is_wrong_is_said_in_words(number, words):
    assert disk_fault(OSError(number, "as the system says", "/a/file")).startswith(words)


def test_other_errors_are_not_the_disks():
    for error in (FileNotFoundError(errno.ENOENT, "no", "/a"), RuntimeError("shape"), KeyError("a"), ConnectionError()):
        assert disk_fault(error) is None


def test_an_export_to_a_full_disk_leaves_nothing(tmp_path):
    teacher = load_quantised(write_planted_model(tmp_path / "model", outlier_scale=1.0), bits=8)
    (tmp_path / "run").mkdir()
    with files_of_at_most(1000), pytest.raises(Exception) as raised:
        export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "run" / "generator_base", "packed_int8")
    assert is_disk_full(raised.value) and not list((tmp_path / "run").iterdir())
