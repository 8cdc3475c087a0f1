"""Where a run goes on from: `resume` does what it says or refuses, and no run loses a line to another one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.errors import UserError
from preflight.inputs import check_inputs
from runs.checkpoints import checkpoints, damage
from runs.metrics import METRICS_FILE, read_metrics
from runs.run_folder import CONFIG_FILE, LOCK_FILE, SUMMARY_FILE, RunFolder, open_run_folder, write_summary
from schemas.compose import CONFIG_ROOT, compose_run_config
from tests.helpers.checkpoints import remove, truncate, write_checkpoint, zero
from tests.test_run_folder import VALUES, files_in, make_unfinished_run


def opened(path: Path, resume: str | Path = "auto", **changes) -> RunFolder:
    """As a process opens it that is killed right after."""
    folder = open_run_folder({**VALUES, "resume": str(resume), **changes}, str(path), str(resume))
    folder.lock.close()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; the lock and what the console said left out."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    left_out = (LOCK_FILE, "training.log")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in left_out}


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / METRICS_FILE)]


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of the steps 2, 4 and 6, and a table and a line for each step up to 7."""
    path = tmp_path / "run"
    make_unfinished_run(path, steps=(2, 4, 6), logged=7)
    for name in ("completions", "evaluations"):
        (path / name).mkdir()
    for step in range(1, 8):
        (path / "completions" / f"completions_{step:05d}.parquet").write_text("")
    return path


# A named checkpoint


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("target", ["new", "other"])
def test_a_checkpoint_is_continued_in_another_folder_and_no_run_is_touched(target, is_finished, run, tmp_path):
    if target == "other":
        make_unfinished_run(tmp_path / "other", steps=(3,))
        if is_finished:
            write_summary(tmp_path / "other", {"steps": 6})
    before, other_before = content(run), content(tmp_path / "other")
    folder = opened(tmp_path / target, run / "checkpoint-4")
    assert folder.checkpoint == tmp_path / target / "checkpoint-4" and damage(folder.checkpoint) is None
    assert list(checkpoints(folder.path)) == [4] and not folder.metrics_file.exists()
    assert content(run) == before
    if target == "other":
        assert content(tmp_path / "other.1") == other_before


@pytest.mark.parametrize("is_finished", [False, True])
def test_going_back_keeps_the_run_as_it_was_and_begins_with_its_history(is_finished, run, tmp_path):
    if is_finished:
        write_summary(run, {"steps": 7})
    before = content(run)
    folder = opened(run, run / "checkpoint-4")
    assert folder.checkpoint == run / "checkpoint-4" and list(checkpoints(run)) == [4]
    assert content(tmp_path / "run.1") == before
    assert steps(run) == [1, 2, 3, 4] and len(files_in(run / "completions")) == 4
    assert not (run / SUMMARY_FILE).exists()


@pytest.mark.parametrize("again", ["auto", "the same command"])
def test_after_going_back_a_killed_run_continues_on_its_new_way(again, run, tmp_path):
    named = run / "checkpoint-4"
    opened(run, named)
    resume = "auto" if again == "auto" else named
    assert opened(run, resume).checkpoint == named  # killed before its first own checkpoint
    write_checkpoint(run, 5)
    assert opened(run, resume).checkpoint == run / "checkpoint-5"
    shutil.rmtree(named)  # rotated away
    assert opened(run, resume).checkpoint == run / "checkpoint-5"
    assert files_in(tmp_path) == ["run", "run.1"]


@pytest.mark.parametrize("resume", ["auto", "run/checkpoint-4"])
def test_a_run_that_was_cut_off_before_it_had_its_checkpoint_begins_there_again(resume, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened(tmp_path / "new", "run/checkpoint-4")
    for _ in range(2):
        shutil.rmtree(tmp_path / "new" / "checkpoint-4")
        assert opened(tmp_path / "new", resume).checkpoint == tmp_path / "new" / "checkpoint-4"
    assert not (tmp_path / "new.1").exists()


def test_one_that_was_cut_off_on_its_way_back_says_where_its_checkpoint_is(run, tmp_path):
    opened(run, run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-4")
    for resume in ("auto", run / "checkpoint-4"):
        with pytest.raises(UserError, match=f"resume={tmp_path / 'run.1' / 'checkpoint-4'}"):
            opened(run, resume)


def test_the_newest_checkpoint_of_the_folder_is_continued_in_place(run, tmp_path):
    assert opened(run, run / "checkpoint-6").checkpoint == run / "checkpoint-6"
    assert steps(run) == [1, 2, 3, 4, 5, 6] and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("name", ["nothing", "checkpoint-8", "no-number", "checkpoint-x", "checkpoint-4.bak", "empty"])
def test_what_is_no_checkpoint_is_one_message_before_anything_moves(name, run, tmp_path):
    for folder in ("no-number", "checkpoint-x", "checkpoint-4.bak"):
        shutil.copytree(run / "checkpoint-4", run / folder)
    (run / "checkpoint-9").mkdir()
    named, before = run / ("checkpoint-9" if name == "empty" else name), content(run)
    values = compose_run_config("teacher_rlt_tiny", [f"output_dir={run}", f"resume={named}"])
    for refused in (lambda: opened(run, named), lambda: opened(tmp_path / "new", named), lambda: check_inputs(values)):
        with pytest.raises(UserError, match="holds no checkpoint"):
            refused()
    assert content(run) == before and files_in(tmp_path) == ["run"]


@pytest.mark.parametrize("harm", [truncate, zero, remove])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_newest_whole_one_is_named(harm, run, tmp_path):
    harm(run / "checkpoint-6" / "optimizer.pt")
    before = content(run)
    with pytest.raises(UserError, match=r"optimizer.pt[\s\S]*resume=.*checkpoint-4"):
        opened(run, run / "checkpoint-6")
    assert content(run) == before and files_in(tmp_path) == ["run"]


def test_a_checkpoint_of_another_model_is_refused_and_other_settings_may_change(run, tmp_path):
    saved = {"optim": "adamw_torch", "new_model": {"hidden_size": 64}, "model_args": {"lora_r": 8}}
    config = {**yaml.safe_load((run / CONFIG_FILE).read_text()), **saved}
    (run / CONFIG_FILE).write_text(yaml.safe_dump(config))
    for other in ({"optim": "sgd"}, {"new_model": {"hidden_size": 32}}, {"model_args": {"lora_r": 4}}):
        with pytest.raises(UserError, match=r"other settings: (optim|new_model|model_args\.lora_r)\n"):
            opened(tmp_path / "new", run / "checkpoint-4", **saved | other)
    assert files_in(tmp_path) == ["run"]
    same = saved | {"model_args": {"lora_r": 8, "device_map": "cpu"}}
    assert opened(tmp_path / "new", run / "checkpoint-4", learning_rate=1e-5, **same).checkpoint is not None


# Damaged checkpoints of the run that is continued


def test_a_damaged_newest_checkpoint_falls_back_and_is_set_aside(run):
    truncate(run / "checkpoint-6" / "optimizer.pt")
    assert opened(run).checkpoint == run / "checkpoint-4"
    assert (run / "checkpoint-6.damaged" / "optimizer.pt").exists() and list(checkpoints(run)) == [4, 2]
    assert steps(run) == [1, 2, 3, 4]
    assert "checkpoint-6: optimizer.pt has" in (run / "logs" / "training.log").read_text()


def test_where_no_checkpoint_is_whole_the_run_is_not_begun_anew_by_itself(run, tmp_path):
    for checkpoint in checkpoints(run).values():
        remove(checkpoint / "scheduler.pt")
    before = content(run)
    with pytest.raises(UserError, match=r"checkpoint-6: scheduler.pt is missing; .*checkpoint-2[\s\S]*resume=never"):
        opened(run)
    assert content(run) == before
    assert opened(run, "never").checkpoint is None and content(tmp_path / "run.1") == before


# Other damage


def test_lines_that_cannot_be_read_are_kept_and_the_others_go_on(run):
    file = run / METRICS_FILE
    lines = file.read_text().splitlines()
    damaged = "\n".join([*lines[:2], "\0\0garbage", "17", '{"no": "step"}', *lines[2:]]) + "\n"
    file.write_bytes(damaged.encode() + b'\xff\xfe{"step": 9, "rew')
    before = file.read_bytes()
    opened(run)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert (run / f"{METRICS_FILE}.damaged").read_bytes() == before
    opened(run)
    assert not (run / f"{METRICS_FILE}.damaged.1").exists()


@pytest.mark.parametrize("text", ["", "a: [", "\0" * 20, "- a list", b"\xff\xfe"])
def test_a_damaged_configuration_is_one_message_and_stays(text, run, tmp_path):
    (run / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(run)
    with pytest.raises(UserError, match=f"{CONFIG_FILE} is damaged"):
        opened(run)
    assert content(run) == before and files_in(tmp_path) == ["run"]
    assert opened(run, run / "checkpoint-6").checkpoint == run / "checkpoint-6"
    assert content(tmp_path / "run.1") == before


@pytest.mark.parametrize("text", ["", '{"steps": 7, "rew', "\0\0", "17"])
def test_a_damaged_summary_is_kept_and_the_run_ends_again(text, run, tmp_path):
    (run / SUMMARY_FILE).write_text(text)
    assert opened(run).checkpoint == run / "checkpoint-6"
    assert (run / f"{SUMMARY_FILE}.damaged").read_text() == text and not (run / SUMMARY_FILE).exists()
    assert files_in(tmp_path) == ["run"]


# The folder


def test_a_folder_is_the_same_by_whatever_path_it_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run)
    opened(run, output_dir=str(run))
    for place, name in ((tmp_path, "run"), (run, "."), (tmp_path, "link"), (run, "../link/../run")):
        monkeypatch.chdir(place)
        folder = opened(Path(name), output_dir=name)
        assert folder.path == run and folder.checkpoint == run / "checkpoint-6"
        folder = None
    assert files_in(tmp_path) == ["link", "run"]


def test_a_finished_run_behind_a_link_is_kept_beside_its_place_and_the_link_stays(run, tmp_path):
    (tmp_path / "disk").mkdir()
    moved = run.rename(tmp_path / "disk" / "run")
    (tmp_path / "link").symlink_to(moved)
    write_summary(moved, {"steps": 7})
    before = content(moved)
    folder = opened(tmp_path / "link")
    assert folder.path == moved and (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk" / "run.1") == before


@pytest.mark.parametrize("exists", [False, True], ids=["a new folder", "a finished run"])
def test_of_runs_that_start_at_the_same_moment_one_trains_and_the_others_are_told(exists, run, tmp_path):
    path = run if exists else tmp_path / "new"
    if exists:
        write_summary(run, {"steps": 7})
    before = content(run)
    code = (
        "import sys, time; from runs.run_folder import open_run_folder; from core.errors import UserError\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"try: folder = open_run_folder({VALUES!r}, {str(path)!r}, 'auto'); print('trains', flush=True)\n"
        "except UserError as error: print('told' if 'another process' in str(error) else error, flush=True)\n"
        "sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": CONFIG_ROOT.parent}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(4)]
    for turn in ("ready", None):
        said = [process.stdout.readline().strip() for process in processes]
        assert turn is None or said == [turn] * 4
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        process.communicate()
    assert sorted(said) == ["told", "told", "told", "trains"]
    assert not exists or content(tmp_path / "run.1") == before
    assert files_in(tmp_path) == (["run", "run.1"] if exists else ["new", "run"])


def test_what_is_kept_aside_is_no_running_run(run, tmp_path):
    opened(run, "never")
    assert not (tmp_path / "run.1" / LOCK_FILE).exists() and (run / LOCK_FILE).read_text() == str(os.getpid())


def test_a_configuration_without_change_is_written_as_it_was(run):
    before = json.dumps(yaml.safe_load((run / CONFIG_FILE).read_text()), sort_keys=True)
    opened(run)
    assert json.dumps(yaml.safe_load((run / CONFIG_FILE).read_text()), sort_keys=True) == before
