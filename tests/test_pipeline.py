"""The runner of pipelines with toy jobs: order, what is repeated, failures, signals and kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import UserError
from core.log import console
from pipelines.run import run_pipeline
from schemas.compose import CONFIG_ROOT
from tests.helpers.toy_pipeline import BEHAVIOUR, COMMAND, INTERRUPTED, note, started, toy_pipeline

ROOT = CONFIG_ROOT.parent
RUNNER = """
import json, sys
from core.log import configure_logging
from pipelines.run import run_pipeline
from tests.helpers.toy_pipeline import COMMAND
configure_logging()
sys.exit(run_pipeline(json.loads(sys.argv[1]), COMMAND))
"""
FOLDER = Path("results/toy")
JOBS = sorted(f"{stage}/seed_{seed}" for seed in (0, 1) for stage in ("first", "second/a", "second/b", "third"))


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(**settings):
    return run_pipeline(toy_pipeline(**settings), COMMAND)


def names_started():
    return sorted(line.split()[0] for line in started())


def start_runner(**settings):
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, json.dumps(toy_pipeline(**settings))], start_new_session=True
    )


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, what):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def changed(stage, **settings):
    """The stages of the toy with other settings in one of them."""
    stages = toy_pipeline()["stages"]
    stages[stage]["settings"] |= settings
    return {"stages": stages}


def test_every_job_runs_once_after_its_inputs_and_none_is_repeated():
    assert run() == 0
    assert names_started() == JOBS
    summary = json.loads((FOLDER / "third/seed_1/summary.json").read_text())
    assert summary["inputs"] == [f"results/toy/second/{arm}/seed_1" for arm in "ab"]
    models = json.loads((FOLDER / "summary.json").read_text())["evaluations"]["third"]["models"]
    assert {name: found["pass@1"]["mean"] for name, found in models.items()} == {"tiny": 0.5, "a": 0.5, "b": 1.0}
    assert "| b | 1.000 [1.000, 1.000] |" in (FOLDER / "summary.md").read_text()
    assert "this is the job first/seed_0" in (FOLDER / "logs/first/seed_0.log").read_text()
    assert "first, seed 0: finished in" in (FOLDER / "logs/pipeline.log").read_text()
    assert run() == 0
    assert names_started() == JOBS


def test_a_further_seed_adds_its_jobs_alone():
    assert run(seeds=[1]) == 0
    assert run(seeds=[1, 0]) == 0
    assert names_started() == JOBS


def test_a_changed_stage_is_done_anew_with_all_that_reads_it_and_the_earlier_one_is_kept():
    assert run(seeds=[0]) == 0
    before = names_started()
    assert run(seeds=[0], **changed("second", temperature=0.5)) == 0
    repeated = names_started()
    for name in before:
        repeated.remove(name)
    assert repeated == ["second/a/seed_0", "second/b/seed_0", "third/seed_0"]
    assert (FOLDER / "second/a/seed_0.1/summary.json").is_file()
    assert (FOLDER / "third/seed_0.1/summary.json").is_file()
    assert not (FOLDER / "first/seed_0.1").exists()


def test_a_failed_job_stops_the_pipeline_which_goes_on_once_the_cause_is_mended():
    BEHAVIOUR.write_text('{"second": 2}')
    with console.capture() as said:
        assert run(seeds=[0]) == 2
    text = " ".join(said.get().split())
    assert "ended with status 2" in text and "because of the weather" in text
    assert "results/toy/logs/second/a/seed_0.log" in text and "the same command" in text
    assert not (FOLDER / "third").exists() and not (FOLDER / "summary.json").exists()
    BEHAVIOUR.unlink()
    assert run(seeds=[0]) == 0
    assert names_started().count("first/seed_0") == 1
    assert (FOLDER / "third/seed_0/summary.json").is_file()


def test_jobs_beside_a_failed_one_save_and_end():
    BEHAVIOUR.write_text('{"first": 7}')
    stages = toy_pipeline()["stages"] | {
        "slow": {"config": "teacher_rlt_tiny", "settings": {"max_steps": 300}},
    }
    order = {name: stages[name] for name in ("slow", "first", "second", "third")}
    assert run(seeds=[0], stages=order) == 1
    assert len(INTERRUPTED.read_text().split()) == 1


def test_a_job_that_leaves_no_result_has_failed():
    command = (sys.executable, "-c", "pass")
    with console.capture() as said:
        assert run_pipeline(toy_pipeline(seeds=[0]), command) == 1
    assert "holds no summary.json" in " ".join(said.get().split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_jobs_once_and_the_same_call_goes_on(number):
    slow = changed("first", max_steps=300)
    process = start_runner(**slow)
    wait_until(lambda: len(started()) == 2, "two jobs started")
    process.send_signal(number)
    assert process.wait(timeout=30) == 130
    pids = [line.split()[1] for line in started()]
    assert sorted(INTERRUPTED.read_text().split()) == sorted(pids)
    assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_second_signal_ends_jobs_that_do_not_end():
    process = start_runner(seeds=[0], **changed("first", max_steps=300))
    wait_until(lambda: started(), "a job started")
    (pid,) = (int(line.split()[1]) for line in started())
    os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not is_alive(pid)


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_job_behind_and_goes_on(tmp_path):
    """The runner is killed with -9 again and again; what is finished is never done again."""
    rng = random.Random(0)
    finished = set()
    for _ in range(5):
        process = start_runner()
        time.sleep(rng.uniform(1.0, 3.5))
        process.kill()
        process.wait()
        pids = [line.split()[1] for line in started()]
        wait_until(lambda pids=pids: not any(map(is_alive, pids)), "jobs end with the runner")
        finished |= {name for name in JOBS if (FOLDER / name / "summary.json").is_file()}
    num_started = {name: names_started().count(name) for name in finished}
    assert run() == 0
    assert {name: names_started().count(name) for name in finished} == num_started
    assert sorted(name for name in JOBS if (FOLDER / name / "summary.json").is_file()) == JOBS
    assert not list(FOLDER.glob("**/*.1"))


@pytest.mark.slow
def test_two_runners_do_not_share_a_folder():
    process = start_runner(**changed("first", max_steps=300))
    wait_until(lambda: len(started()) == 2, "two jobs started")
    with pytest.raises(UserError, match="another process runs a pipeline"):
        run()
    process.terminate()
    assert process.wait(timeout=30) == 130


def test_a_dry_run_shows_jobs_and_starts_nothing(tmp_path):
    with console.capture() as said:
        assert run(dry_run=True) == 0
    text = said.get()
    assert "8 jobs, 0 of them finished" in text and "evaluate_tiny" in text and "not known" in text
    assert not list(tmp_path.iterdir())
    assert run(seeds=[0]) == 0
    with console.capture() as said:
        run(dry_run=True)
    assert "8 jobs, 4 of them finished" in said.get() and "1 of 2" in said.get()


def test_expected_minutes_say_how_long_it_takes():
    stages = toy_pipeline()["stages"]
    for stage in stages.values():
        stage["expected_minutes"] = 2
    with console.capture() as said:
        run(dry_run=True, stages=stages)
    assert "about 8m00s left" in " ".join(said.get().split())  # 8 jobs of 2 minutes, two at once


def test_a_folder_with_something_else_is_refused(tmp_path):
    note(tmp_path / "notes.txt", "mine")
    with pytest.raises(UserError, match=r"no jobs\.json of a pipeline"):
        run(output_dir=str(tmp_path))


def test_a_damaged_list_of_jobs_is_an_error_that_says_what_to_do():
    FOLDER.mkdir(parents=True)
    (FOLDER / "jobs.json").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        run()


def test_signal_handlers_are_those_of_before():
    before = signal.getsignal(signal.SIGTERM)
    assert run(seeds=[0]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
