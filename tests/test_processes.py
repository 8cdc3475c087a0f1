"""A launcher of several processes is refused at once, by one message; one of a single process goes on."""

import sys

import pytest

from tests.helpers.command import ROOT, run_command, run_train


def test_the_first_of_several_processes_says_why_it_stops(tmp_path):
    done = run_train("--config-name=teacher_rlt_tiny", cwd=tmp_path, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done.status == 2 and done.cpu_s < 1.5
    assert "WORLD_SIZE is 2" in done.text and "one process" in done.text and "Traceback" not in done.text
    assert not list(tmp_path.iterdir())


def test_the_others_stop_without_a_word(tmp_path):
    done = run_train("--config-name=teacher_rlt_tiny", cwd=tmp_path, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    assert (done.status, done.text) == (2, "")


@pytest.mark.parametrize("world_size", ["", "1"])
def test_a_launcher_of_one_process_goes_on(world_size, tmp_path):
    environment = {"WORLD_SIZE": world_size, "RANK": "0", "LOCAL_RANK": "0"}
    done = run_train("--config-name=teacher_rlt_tiny", "--cfg", "job", cwd=tmp_path, **environment)
    assert done.status == 0 and "train_batch_size: 64" in done.text


@pytest.mark.slow
def test_torchrun_shows_one_message_and_leaves_nothing(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    done = run_command(*launcher, ROOT / "train.py", "--config-name=teacher_rlt_tiny", cwd=tmp_path)
    assert done.status != 0 and done.text.count("this run cannot start") == 1
    assert "another process" not in done.text and not list(tmp_path.iterdir())
