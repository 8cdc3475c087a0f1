"""Whole runs of several methods that go on from a checkpoint: elsewhere, after the last step, with planted pickles."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.errors import UserError
from runs.checkpoints import checkpoints, publish_checkpoint
from runs.metrics import METRICS_FILE, read_metrics
from runs.run_folder import CONFIG_FILE, SUMMARY_FILE
from schemas.compose import compose_run_config
from tests.helpers.tiny_run import SMALL, write_random_model
from tests.helpers.tiny_sft import SMALL as SMALL_SFT
from tests.helpers.tiny_sft import write_rows
from trainers.start import train_runs

RATE = 1e-3
STEPS = (
    f"learning_rate={RATE}",
    "max_steps=4",
    "save_steps=1",
    "save_total_limit=10",
    "logging_steps=1",
    "eval_steps=3",
    "eval_strategy=steps",
)
DIFFUSION = ("train_batch_size=8", "per_device_train_batch_size=4", "num_eval_prompts=4", "num_likelihood_samples=4")
_NOT_COMPARED = ("time/", "memory/", "tokens_per_s/", "step_time", "total_flos")

Train = Callable[..., Path]


@pytest.fixture(scope="module", params=[pytest.param("rlt", marks=pytest.mark.slow), "masked_diffusion", "student_sft"])
def train(request, tmp_path_factory) -> Train:
    """Train in a folder, and return it."""
    if request.param == "rlt":
        model = write_random_model(tmp_path_factory.mktemp("model"))
        name, words = "teacher_rlt_tiny", (*SMALL, f"model_name_or_path={model}", f"student_model={model}")
    elif request.param == "student_sft":
        folder = tmp_path_factory.mktemp("model")
        model, rows = write_random_model(folder / "model"), write_rows(folder / "rows.jsonl")
        name, words = "student_sft_tiny", (*SMALL_SFT, f"model_name_or_path={model}", f"dataset_id_or_path={rows}")
    else:
        rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows.write_text("".join(json.dumps({"question": f"{i}+1", "solution": f"={i + 1}"}) + "\n" for i in range(40)))
        name, words = "llada_tiny", (*DIFFUSION, "sampling_steps=4", f"dataset_id_or_path={rows}")

    def run(output_dir: Path, *more: str) -> Path:
        (finished,) = train_runs([compose_run_config(name, [*words, *STEPS, f"output_dir={output_dir}", *more])])
        return finished.folder

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same run, killed right before its summary was written."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / SUMMARY_FILE).unlink()
    return tmp_path / "run"


def figures(folder: Path, after_step: int = -1) -> list[dict]:
    lines = [line for line in read_metrics(folder / METRICS_FILE) if "train_runtime" not in line]
    return [
        {key: value for key, value in line.items() if not key.startswith(_NOT_COMPARED)}
        for line in lines
        if line["step"] > after_step
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{name}": t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def tables(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


def test_a_checkpoint_is_continued_in_a_new_folder_as_if_there_had_been_no_break(train, whole, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    there = train(tmp_path / "there", f"resume={whole / 'checkpoint-2'}")
    assert figures(there) == [pytest.approx(line, abs=1e-6) for line in figures(whole, after_step=2)]
    assert weights(there) and same(weights(there), weights(whole))
    assert list(checkpoints(there)) == [4, 3, 2]
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


def test_ending_a_run_twice_changes_nothing(train, whole, copy):
    again = train(copy)
    assert figures(again) == figures(whole) and tables(again) == tables(whole)
    assert sum("train_runtime" in line for line in read_metrics(again / METRICS_FILE)) == 1
    ours, theirs = (json.loads((folder / SUMMARY_FILE).read_text()) for folder in (again, whole))
    assert ours["memory"].pop("phases").keys() == theirs["memory"].pop("phases").keys() and ours == theirs
    assert same(weights(again), weights(whole))


class Planted:
    """A pickle that makes a file where it is read with code execution."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def plant(checkpoint: Path, names: tuple[str, ...], marker: Path, *, plain: bool) -> None:
    for name in names:
        if plain:
            (checkpoint / name).write_bytes(pickle.dumps(Planted(marker)))
        else:
            torch.save(Planted(marker), checkpoint / name)


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


def test_no_pickle_is_left_that_no_library_asks_for(whole):
    found = {file.name for file in whole.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle")}
    assert found == set(PICKLES) - {"training_args.bin"}


def test_planted_pickles_run_no_code_and_the_checkpoint_before_them_is_taken(train, whole, copy, tmp_path):
    marker = tmp_path / "code ran"
    plant(copy / "checkpoint-4", PICKLES, marker, plain=True)
    plant(copy, ("training_args.bin",), marker, plain=True)
    again = train(copy)
    assert not marker.exists() and (copy / "checkpoint-4.damaged").is_dir()
    assert figures(again) == [pytest.approx(line, abs=1e-6) for line in figures(whole)]
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize(("name", "plain"), zip(PICKLES, (True, False, False), strict=False))
def test_one_whose_manifest_was_made_to_fit_is_refused_as_it_is_read(name, plain, train, copy, tmp_path):
    marker, checkpoint = tmp_path / "code ran", copy / "checkpoint-3"
    shutil.rmtree(copy / "checkpoint-4")
    plant(checkpoint, (name, "training_args.bin"), marker, plain=plain)
    (copy / ".saving").mkdir()
    publish_checkpoint(checkpoint.rename(copy / ".saving" / "new"), checkpoint)
    with pytest.raises(UserError, match="checkpoint-3 holds more than tensors and numbers"):
        train(copy)
    assert not marker.exists() and not (copy / SUMMARY_FILE).exists()


def test_a_lower_learning_rate_takes_effect_from_the_checkpoint_on(train, whole, tmp_path):
    rates = {line["step"]: line["learning_rate"] for line in figures(whole) if "learning_rate" in line}
    there = train(tmp_path / "there", f"resume={whole / 'checkpoint-2'}", "learning_rate=1e-6")
    ours = {line["step"]: line["learning_rate"] for line in figures(there) if "learning_rate" in line}
    assert ours == pytest.approx({step: rates[step] * 1e-6 / RATE for step in (3, 4)}) and ours[4] > 0


def test_a_run_killed_before_its_last_rotation_keeps_no_more_checkpoints_than_asked_for(train, copy):
    saved = (copy / CONFIG_FILE).read_text()
    (copy / CONFIG_FILE).write_text(saved.replace("save_total_limit: 10", "save_total_limit: 2"))
    assert len(checkpoints(copy)) > 2
    train(copy, "save_total_limit=2")
    assert list(checkpoints(copy)) == [4, 3]
