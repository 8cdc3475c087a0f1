"""Pipelines as configurations: references, arms and seeds, what is refused, plans of jobs, the summary's figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from pipelines import plans
from pipelines.board import steps_of, time_left
from pipelines.jobs import for_planning, jobs_of
from pipelines.plans import check_jobs, plan_jobs
from pipelines.summary import _with_interval
from schemas.compose import command_line, compose_run_config, pipeline_names
from schemas.pipeline import load_pipeline_config
from schemas.run import ConfigError
from tests.helpers.toy_pipeline import toy_pipeline


def toy(**settings):
    return load_pipeline_config(toy_pipeline(**settings))


def with_settings(stage, settings, **others):
    stages = toy_pipeline()["stages"]
    stages[stage]["settings"] |= settings
    return toy_pipeline(stages=stages, **others)


@pytest.fixture(scope="module")
def jobs():
    return jobs_of(toy())


def test_a_job_for_each_stage_arm_and_seed_with_inputs_before_what_reads_them(jobs):
    assert list(jobs)[:4] == ["first/seed_0", "second/a/seed_0", "second/b/seed_0", "third/seed_0"]
    assert len(jobs) == 8
    for place, job in enumerate(jobs.values()):
        assert set(job.inputs) <= set(list(jobs)[:place])


def test_references_are_those_of_the_jobs_own_seed_and_arm(jobs):
    assert jobs["first/seed_1"].settings["seed"] == 1
    assert jobs["second/b/seed_1"].settings["model_args"] == {"adapter_path": "results/toy/first/seed_1"}
    assert jobs["second/b/seed_1"].settings["learning_rate"] == 0.001
    assert "learning_rate" not in jobs["second/a/seed_1"].settings
    folders = ["results/toy/second/a/seed_1", "results/toy/second/b/seed_1"]
    assert jobs["third/seed_1"].settings["models"] == ["tiny", *folders]
    assert jobs["third/seed_1"].inputs == ("second/a/seed_1", "second/b/seed_1")


def test_a_text_around_a_reference_stays_and_an_arm_can_be_named():
    values = with_settings(
        "third", {"models": ["tiny_student_{seed}", "{folder:second/b}", "{folders:second}/checkpoint-1"]}
    )
    job = jobs_of(load_pipeline_config(values))["third/seed_0"]
    ends = [f"results/toy/second/{arm}/seed_0/checkpoint-1" for arm in "ab"]
    assert job.settings["models"] == ["tiny_student_0", "results/toy/second/b/seed_0", *ends]


def test_the_words_of_a_job_compose_to_its_values(jobs):
    job = jobs["second/b/seed_0"]
    name, *words = job.words
    composed = compose_run_config(name.partition("=")[2], words)
    assert composed["output_dir"] == "results/toy/second/b/seed_0" == str(job.folder)
    assert composed["learning_rate"] == 0.001 and composed["model_args"].items() <= job.values["model_args"].items()
    assert {key: job.values[key] for key in composed if key != "model_args"} == {
        key: value for key, value in composed.items() if key != "model_args"
    }


def test_without_seeds_each_stage_runs_once():
    stages = toy_pipeline()["stages"]
    stages["first"]["settings"] = {}
    assert list(jobs_of(toy(stages=stages, seeds=None))) == ["first", "second/a", "second/b", "third"]


def test_a_fingerprint_follows_settings_and_inputs_and_not_the_folder(jobs):
    other = jobs_of(load_pipeline_config(with_settings("first", {"temperature": 0.5})))
    assert all(other[name].fingerprint != job.fingerprint for name, job in jobs.items())
    later = jobs_of(load_pipeline_config(with_settings("third", {"num_samples": 2})))
    assert [name for name, job in jobs.items() if later[name].fingerprint != job.fingerprint] == [
        "third/seed_0",
        "third/seed_1",
    ]
    fewer = jobs_of(toy(seeds=[1], jobs_at_once=1))
    assert all(jobs[name].fingerprint == job.fingerprint for name, job in fewer.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            with_settings("first", {"x": "{folder:third}"}),
            "names the stage 'third'. Use one that comes before it: none",
        ),
        (with_settings("second", {"x": "{folder:frist}"}), "names the stage 'frist'"),
        (with_settings("third", {"x": "{folder:second}"}), "has the arms a, b, not None"),
        (with_settings("third", {"x": "{folder:second/c}"}), "has the arms a, b, not c"),
        (with_settings("second", {"x": "{folder:first/a}"}), "stage first has no arms"),
        (with_settings("third", {"x": "{folders:second}"}), "outside of a list. Use [{folders:second}]"),
        (with_settings("first", {"x": "{arm}"}), "the stage has no arms"),
        (with_settings("first", {"x": "{sed}"}), "says {sed}. Use {seed}"),
        (toy_pipeline(seeds=None), "`seeds` is null"),
        (toy_pipeline(seeds=[1, 1]), "names one twice"),
        (toy_pipeline(seeds=[]), "`seeds`"),
        (toy_pipeline(stages={}), "`stages`"),
        (toy_pipeline(stages={"a/b": {"config": "teacher_rlt_tiny"}}), "stages"),
        (toy_pipeline(stages={"a": {"config": "teacher_rlt_tiny", "max_steps": 3}}), "`stages.a.max_steps`"),
        (toy_pipeline(max_steps=3), "stages.STAGE.settings.max_steps=VALUE"),
        (toy_pipeline(jobs_at_once=0), "`jobs_at_once`"),
    ],
)
def test_what_cannot_work_is_refused_and_named(values, message):
    with pytest.raises(ConfigError) as refused:
        load_pipeline_config(values)
    assert message in str(refused.value)


def test_a_stage_with_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match=r"`max_stepz` is not a setting.*\[stage first\]"):
        jobs_of(load_pipeline_config(with_settings("first", {"max_stepz": 3})))


def test_dry_run_is_a_word_too():
    assert "++dry_run=true" in command_line(["--config-name=pipeline_tiny", "--dry-run"])


def test_a_setting_of_a_stage_can_be_changed_on_the_command_line():
    values = compose_run_config("pipeline_tiny", ["seeds=[7]", "stages.teacher.settings.max_steps=3"])
    pipeline = load_pipeline_config(values)
    assert pipeline.seeds == [7] and pipeline.stages["teacher"].settings == {"seed": "{seed}", "max_steps": 3}


@pytest.mark.parametrize("name", pipeline_names())
def test_shipped_pipelines_compose_and_every_job_fits_its_gpu(name):
    words = ["seeds=[0]"] if name.endswith("tiny") else []
    jobs = jobs_of(load_pipeline_config(compose_run_config(name, words)))
    assert all(one.plan.fits() and one.disk_bytes >= 0 for one in plan_jobs(jobs, None))
    assert {"teacher_sft", "rlt", "collect_traces", "student_sft", "evaluate"} == {
        job.config.method for job in jobs.values()
    }


# Plans


def test_what_is_not_there_yet_is_planned_by_the_base_it_is_made_from(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second, third = (for_planning(jobs[name], jobs) for name in ("second/a/seed_0", "third/seed_0"))
    assert second.config.model_args.adapter_path is None
    assert third.config.models == ["tiny"]
    Path("results/toy/first/seed_0").mkdir(parents=True)
    assert for_planning(jobs["second/a/seed_0"], jobs) is jobs["second/a/seed_0"]


def test_a_job_that_exceeds_the_gpu_is_refused_before_anything_starts(jobs, tmp_path):
    with pytest.raises(UserError, match="first, seed 0"):
        check_jobs(plan_jobs(jobs, 10_000_000), tmp_path)


def test_a_disk_that_is_too_small_is_refused(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "free_bytes", lambda folder: 0)
    with pytest.raises(UserError, match=r"0\.0 GB free"):
        check_jobs(plan_jobs(jobs, None), tmp_path)


# Progress


def test_the_time_left_comes_from_finished_jobs_of_the_stage_else_from_what_is_expected(jobs):
    first, second, third = jobs["first/seed_0"], jobs["second/a/seed_0"], jobs["third/seed_0"]
    known = {"first/seed_1": {"seconds": 100.0}, "first/seed_2": {"seconds": 200.0}}
    expected = {"first": 1.0, "second": 60.0, "third": None}
    assert time_left([(first, 30.0)], [second], known, 2, expected) == "about 1m30s left"
    assert time_left([], [third], {}, 2, expected) == "third (time not known) left"
    assert time_left([], [second, third], {}, 1, expected) == "about 1m00s and third (time not known) left"


def test_steps_are_read_from_the_metrics_of_the_job(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = jobs["first/seed_0"]
    assert steps_of(job) == (0, 1)
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n" + json.dumps({"step": 4}) + '\n{"st')
    assert steps_of(job) == (4, 1)
    assert steps_of(jobs["third/seed_0"])[1] is None


# Figures


def test_an_interval_holds_both_kinds_of_chance():
    """Against plain resampling, one draw after another."""
    rng = np.random.default_rng(1)
    seeds = [rng.binomial(1, share, 40).astype(float) for share in (0.2, 0.5, 0.6)]
    found = _with_interval(seeds)
    plain = []
    for _ in range(4000):
        drawn = [seeds[i] for i in rng.integers(3, size=3)]
        plain.append(np.mean([values[rng.integers(40, size=40)].mean() for values in drawn]))
    low, high = np.quantile(plain, [0.025, 0.975])
    assert found["mean"] == pytest.approx(np.mean([values.mean() for values in seeds]))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    alone = _with_interval([np.concatenate(seeds)])
    assert alone["high"] - alone["low"] < found["high"] - found["low"]
