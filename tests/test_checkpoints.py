"""Checkpoints of a run: published whole, verified byte by byte, rotated; no damage passes for a checkpoint."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import UserError
from runs import files
from runs.checkpoints import (
    MANIFEST_FILE,
    check_whole,
    checkpoints,
    copy_checkpoint,
    damage,
    newest_whole,
    publish_checkpoint,
    rotate_checkpoints,
    set_aside_newer,
)
from schemas.compose import CONFIG_ROOT
from tests.helpers.checkpoints import DAMAGES, FILES, remove, write_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_checkpoint_lists_every_file_with_size_and_hash_and_is_whole(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 3)
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {*FILES, "trainer_state.json"}
    for name, record in manifest["files"].items():
        assert record["bytes"] == (checkpoint / name).stat().st_size and len(record["sha256"]) == 64
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json", MANIFEST_FILE])
@pytest.mark.parametrize("harm", DAMAGES)
def test_any_damage_to_any_file_is_found_and_named_and_an_older_checkpoint_is_taken(harm, name, tmp_path):
    older, newer = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    harm(newer / name)
    assert name in damage(newer)
    assert newest_whole(tmp_path) == older
    with pytest.raises(UserError) as error:
        check_whole(newer)
    assert name in str(error.value) and f"resume={older}" in str(error.value)


def test_one_flipped_bit_is_found_although_size_and_time_are_as_they_were(tmp_path):
    file = write_checkpoint(tmp_path, 2) / FILES[0]
    before, content = file.stat(), bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert damage(file.parent) == f"{FILES[0]} does not hold what was saved"


def test_a_checkpoint_that_was_renamed_is_not_that_of_its_name(tmp_path):
    renamed = write_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoint-9")
    assert damage(renamed) == f"its {MANIFEST_FILE} is that of step 2"


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"step": 2, "files": []}', '{"step": 2, "files": {"x": 1}}', "\0"])
def test_a_manifest_of_another_form_is_damaged(manifest, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 2)
    (checkpoint / MANIFEST_FILE).write_text(manifest)
    assert damage(checkpoint) == f"{MANIFEST_FILE} is damaged"


def write_old_checkpoint(run: Path, step: int) -> Path:
    """As a run wrote it before there were manifests: torch's zip files, safetensors, the trainer's state."""
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(checkpoint / name, "w") as archive:
            archive.writestr("data.pkl", bytes(range(256)))
    save_file({"weight": np.ones(64)}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def test_a_checkpoint_from_before_manifests_is_taken_if_its_files_are_complete(tmp_path):
    checkpoint = write_old_checkpoint(tmp_path, 2)
    assert newest_whole(tmp_path) == checkpoint


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", DAMAGES)
def test_and_is_not_if_a_file_of_it_is_damaged(harm, name, tmp_path):
    checkpoint = write_old_checkpoint(tmp_path, 2)
    harm(checkpoint / name)
    assert damage(checkpoint)


def test_a_missing_manifest_is_damage_where_other_checkpoints_have_one(tmp_path):
    write_checkpoint(tmp_path, 1)
    assert damage(write_old_checkpoint(tmp_path, 2)) == f"{MANIFEST_FILE} is missing"


def test_rotation_deletes_the_oldest_checkpoints_and_nothing_else(tmp_path):
    others = ["checkpoint-2.bak", "checkpoint-3-good", "checkpoint-x", "checkpoint-007", "checkpoint-4.damaged", "mine"]
    for step in (1, 2, 9, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".saving").rmdir()
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    rotate_checkpoints(tmp_path, 2)
    assert names(tmp_path) == sorted([*others, "checkpoint-10", "checkpoint-9", "checkpoint-5"])
    rotate_checkpoints(tmp_path, None)
    assert list(checkpoints(tmp_path)) == [10, 9]


def test_rotation_leaves_the_target_of_a_link_alone(tmp_path):
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere)
    write_checkpoint(tmp_path / "run", 2)
    rotate_checkpoints(tmp_path / "run", 1)
    assert damage(elsewhere) is None


@pytest.mark.parametrize("fails", [MANIFEST_FILE, "optimizer.pt"])
def test_a_disk_that_is_full_while_the_manifest_is_made_publishes_nothing(fails, tmp_path, monkeypatch):
    def no_space(handle):
        if Path(f"/proc/self/fd/{handle}").resolve().name.removeprefix(".").removesuffix(".partial") == fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    older = write_checkpoint(tmp_path, 2)
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 4)
    assert list(checkpoints(tmp_path)) == [2] and newest_whole(tmp_path) == older


def test_publishing_replaces_an_older_checkpoint_of_the_same_step(tmp_path):
    write_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "left_over").write_text("")
    staged = tmp_path / ".saving" / "new"
    staged.mkdir()
    (staged / "trainer_state.json").write_text("new")
    publish_checkpoint(staged, tmp_path / "checkpoint-3")
    assert names(tmp_path / "checkpoint-3") == [MANIFEST_FILE, "trainer_state.json"]
    assert damage(tmp_path / "checkpoint-3") is None and not names(tmp_path / ".saving")


def test_a_copy_takes_no_space_and_outlives_its_source(tmp_path):
    source = write_checkpoint(tmp_path / "one", 3)
    (tmp_path / "two").mkdir()
    copy = copy_checkpoint(source, tmp_path / "two", tmp_path / "two" / ".saving")
    assert (copy / FILES[0]).samefile(source / FILES[0])
    remove(source / FILES[0])
    rotate_checkpoints(tmp_path / "one", 1)
    assert damage(copy) is None


def test_newer_checkpoints_are_set_aside_under_a_name_that_counts_no_more(tmp_path):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-6.damaged").mkdir()
    set_aside_newer(tmp_path / "checkpoint-2")
    assert list(checkpoints(tmp_path)) == [2]
    assert {"checkpoint-4.damaged", "checkpoint-6.damaged", "checkpoint-6.damaged.1"} < set(names(tmp_path))


def test_checkpoints_are_verified_without_torch():
    code = "import sys, runs.checkpoints; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=CONFIG_ROOT.parent, capture_output=True, text=True)
    assert "runs.checkpoints" in loaded.stdout.split() and "torch" not in loaded.stdout.split()
