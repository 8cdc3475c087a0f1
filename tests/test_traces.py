"""Traces: ranking and choice, chunks and seeds, summary, dataset card, upload; and a collection that is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow
import pytest

import traces.run
from core.errors import StoppedError, UserError
from core.types import Phase
from data.dataset import load_rows
from data.embedded.tokenizer import build_tokenizer
from data.formats import PromptFormat
from data.tags import TAG_STYLES
from generation.policy import sampling_seeds
from planner.plan import plan_run
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import ConfigError, load_run_config
from traces.candidates import by_question, choose, is_usable, rank
from traces.card import TracesCard
from traces.chunks import Chunk, finished, read_chunks, split, trace_seeds, write_chunk
from traces.result import DATASET_FILES, student_row, write_traces
from traces.summary import TRACES_REPORT, summarise_traces
from traces.teacher import with_teacher

ROOT = CONFIG_ROOT.parent
SHORT = PromptFormat.from_styles("bespoke", "short")


def config_of(*words):
    return load_run_config(compose_run_config("collect_traces_tiny", words))


def candidate(row, sample, reward, **others):
    fixed = {"question": f"q{row}", "solution": "=1", "reasoning_trace": f"t{row}{sample}", "problem": None}
    figures = {"num_tokens": 10, "unprocessed_answer_log_prob_mean": reward / 2, "matched": 1.0}
    return {"row": row, "sample": sample, "reward": reward, **fixed, **figures, **others}


def random_table(seed, num_questions=20, num_samples=4):
    chance = random.Random(seed)
    table = [
        candidate(
            row,
            sample,
            chance.choice((-2.0, -1.0, 0.5)),
            num_tokens=chance.randrange(1, 30),
            problem=chance.choice((None, None, "never closed", "empty")),
            kind=chance.choice(("honest", "wrong")),
        )
        for row in range(num_questions)
        for sample in range(num_samples)
    ]
    for candidates in by_question(table):
        rank(candidates)
    return table


@pytest.mark.parametrize("seed", range(5))
def test_ranks_order_the_candidates_of_a_question_by_reward_and_then_by_sample(seed):
    for candidates in by_question(random_table(seed)):
        ordered = sorted(candidates, key=lambda row: row["rank"])
        assert [row["rank"] for row in ordered] == list(range(len(candidates)))
        keys = [(-row["reward"], row["sample"]) for row in ordered]
        assert keys == sorted(keys)


@pytest.mark.parametrize("choice", ["best", "random", "first", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_only_usable_candidates_are_chosen_one_of_each_question_unless_all(seed, choice):
    for candidates in by_question(random_table(seed)):
        usable = [is_usable(row, max_tokens=20, malformed=False) for row in candidates]
        choose(candidates, choice, usable=usable, seed=seed)
        fit = [row for row, is_fit in zip(candidates, usable, strict=True) if is_fit]
        chosen = [row for row in candidates if row["chosen"]]
        assert all(row["num_tokens"] <= 20 and row["problem"] is None for row in chosen)
        if choice == "all":
            assert chosen == fit
        else:
            assert len(chosen) == min(1, len(fit))
        if fit and choice == "best":
            assert chosen[0]["reward"] == max(row["reward"] for row in fit)
        if fit and choice == "first":
            assert chosen[0]["sample"] == min(row["sample"] for row in fit)


def test_malformed_candidates_are_chosen_where_that_is_asked_for():
    broken = candidate(0, 0, 1.0, problem="never closed", num_tokens=48)
    assert not is_usable(broken, max_tokens=None, malformed=False)
    assert is_usable(broken, max_tokens=None, malformed=True)
    assert not is_usable(broken, max_tokens=47, malformed=True)


def test_a_random_choice_follows_from_seed_and_row_and_takes_each_sample():
    def chosen(seed, row):
        candidates = [candidate(row, sample, 0.0) for sample in range(4)]
        rank(candidates)
        choose(candidates, "random", usable=[True] * 4, seed=seed)
        return next(one["sample"] for one in candidates if one["chosen"])

    first = [chosen(3, row) for row in range(60)]
    assert first == [chosen(3, row) for row in range(60)] != [chosen(4, row) for row in range(60)]
    assert set(first) == {0, 1, 2, 3}


def test_seeds_are_those_of_row_and_sample_however_the_rows_are_cut():
    together = trace_seeds(42, range(10), 3)
    assert together == trace_seeds(42, range(4), 3) + trace_seeds(42, range(4, 10), 3)
    assert together[3:6] == trace_seeds(42, [1], 5)[:3]
    training = sampling_seeds(42, stream=0, step=0, num_rows=30) + sampling_seeds(42, stream=1, step=0, num_rows=30)
    assert len({*together, *training}) == 90
    assert trace_seeds(43, range(10), 3) != together


@pytest.mark.parametrize(("num_questions", "size"), [(1, 1), (10, 3), (9, 3), (5, 100)])
def test_chunks_cover_each_question_once(num_questions, size):
    chunks = split(num_questions, size)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_questions))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))


def chunk_rows(chunk):
    return [candidate(row, sample, 0.0) for row in range(chunk.start, chunk.stop) for sample in range(2)]


def test_whole_chunks_are_found_again_and_damaged_ones_are_not(tmp_path):
    chunks, questions = split(6, 2), [f"q{row}" for row in range(6)]
    assert list(finished(chunks, tmp_path, questions, 2)) == []
    for chunk in chunks:
        write_chunk(chunk, tmp_path, chunk_rows(chunk))
    assert list(finished(chunks, tmp_path, questions, 2)) == chunks
    assert [(row["row"], row["sample"]) for row in read_chunks(chunks, tmp_path).to_pylist()] == [
        (row, sample) for row in range(6) for sample in range(2)
    ]
    file = chunks[1].file(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    assert list(finished(chunks, tmp_path, questions, 2)) == [chunks[0], chunks[2]]


def test_a_chunk_of_other_questions_is_refused(tmp_path):
    chunk = Chunk(0, 0, 2)
    write_chunk(chunk, tmp_path, chunk_rows(chunk))
    with pytest.raises(UserError, match="holds traces of other questions"):
        list(finished([chunk], tmp_path, ["q0", "another"], 2))


def test_a_chunk_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(pyarrow.parquet, "write_table", fail)
    with pytest.raises(OSError, match="no room"):
        write_chunk(Chunk(0, 0, 1), tmp_path, chunk_rows(Chunk(0, 0, 1)))
    assert not list((tmp_path / "chunks").iterdir())


def test_the_summary_is_that_of_a_plain_loop():
    table = random_table(7)
    for candidates in by_question(table):
        choose(
            candidates, "best", usable=[is_usable(row, max_tokens=25, malformed=False) for row in candidates], seed=0
        )
    summary = summarise_traces(table, max_tokens=25, malformed=False)
    best, anyone = [], []
    for number in range(20):
        fit = [row for row in table if row["row"] == number and row["problem"] is None and row["num_tokens"] <= 25]
        if fit:
            best.append(max(row["reward"] for row in fit))
            anyone.append(sum(row["reward"] for row in fit) / len(fit))
    assert summary["best_of_n"]["reward"]["best"] == pytest.approx(sum(best) / len(best))
    assert summary["best_of_n"]["reward"]["random"] == pytest.approx(sum(anyone) / len(anyone))
    assert summary["chosen"] == len(best) == 20 - summary["questions_without_a_trace"]
    assert summary["reward_by_rank"] == sorted(summary["reward_by_rank"], reverse=True)
    assert sum(summary["kinds"].values()) == pytest.approx(1) == sum(summary["kinds_of_chosen"].values())
    found = summary["best_of_n"]["reward"]
    assert found["low"] < found["best"] - found["random"] < found["high"]
    shown = [column.header for table in TRACES_REPORT.of_traces(summary) for column in table.columns]
    assert "best" in shown and "random" in shown


def test_what_students_are_given_is_read_back_as_questions_solutions_and_traces(tmp_path):
    table = [
        candidate(0, 0, 1.0, solution="=3", chosen=True, reasoning_trace="1+2=3;"),
        candidate(1, 0, 1.0, solution="=4", chosen=False),
    ]
    write_traces(tmp_path, pyarrow.Table.from_pylist(table), SHORT)
    file = tmp_path / "traces.jsonl"
    (row,) = load_rows(config_of(), str(file), TAG_STYLES["bespoke"], 0)
    assert row == {"question": "q0", "solution": "=3", "reasoning_trace": "1+2=3;"}
    assert len(pd.read_parquet(tmp_path / "traces.parquet")) == 2


def test_the_students_chat_is_the_text_that_the_reward_scores():
    tokenizer = build_tokenizer()
    messages = student_row(candidate(0, 0, 1.0), SHORT)["messages"]
    scored = SHORT.student_head_text(tokenizer, "q0") + "t00" + SHORT.student_tail(tokenizer, "q0", "=1").text
    assert tokenizer.apply_chat_template(messages, tokenize=False) == scored


def test_the_plan_is_that_of_the_teachers_run_without_training():
    def planned(*words):
        return plan_run(load_run_config(compose_run_config(*words)), int(85e9))

    teacher = planned("teacher_rlt_mono_85gb", ["sync_ref_model=false"])
    traces_plan = planned("collect_traces_85gb", ["num_samples=16", "generation_aggregation_steps=3"])
    assert traces_plan.peak_bytes(Phase.TRAIN) == 0 < teacher.peak_bytes(Phase.TRAIN)
    for phase in (Phase.GENERATE, Phase.SCORE):
        ours, theirs = traces_plan.components[phase], dict(teacher.components[phase])
        del theirs["optimizer states"]
        assert ours == theirs


def test_a_collection_takes_no_setting_of_a_training():
    for words in (["learning_rate=1"], ["train_batch_size=8"], ["offload_checkpoints=true"], ["num_generations=4"]):
        with pytest.raises(ConfigError, match="is not a setting"):
            config_of(*words)
    with pytest.raises(ConfigError, match="a collection has no checkpoints"):
        config_of("resume=results/x/checkpoint-3")


def trained_run(folder, **settings):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    saved = {"model_name_or_path": "tiny", "tag_format": "bespoke", "prompt_style": "short", **settings}
    (folder / "config.yaml").write_text(json.dumps(saved))
    return folder


def test_the_teacher_is_the_adapter_of_a_run_of_the_same_base_and_format(tmp_path):
    run = trained_run(tmp_path / "run")
    assert with_teacher(config_of(f"teacher_run={run}")).model_args.adapter_path == str(run)
    assert with_teacher(config_of()).model_args.adapter_path is None
    other = trained_run(tmp_path / "other", prompt_style="stratos")
    with pytest.raises(UserError, match="prompt_style 'stratos'"):
        with_teacher(config_of(f"teacher_run={other}"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no trained teacher"):
        with_teacher(config_of(f"teacher_run={tmp_path / 'nothing'}"))


def test_whole_weights_take_the_place_of_the_base(tmp_path):
    run = trained_run(tmp_path / "run")
    (run / "adapter_config.json").rename(run / "model.safetensors")
    config = with_teacher(config_of(f"teacher_run={run}"))
    assert config.model_name_or_path == str(run) and config.model_args.adapter_path is None


def test_the_card_is_one_of_a_dataset_and_tells_where_it_comes_from():
    table = random_table(1)
    for candidates in by_question(table):
        choose(candidates, "best", usable=[row["problem"] is None for row in candidates], seed=0)
    summary = summarise_traces(table, max_tokens=None, malformed=False)
    config = config_of("teacher_run=/home/someone/results/teacher_rlt_tiny", "temperature=0.9")
    text = TracesCard(config=config, summary=summary, term_means={"reward": -1.5}, example=table[0]).markdown()
    for said in ("data_files: traces.jsonl", "`teacher_rlt_tiny`", "temperature 0.9", "| `reward` | -1.500 |", "t00"):
        assert said in text
    assert "someone" not in text


def test_the_upload_is_of_the_dataset_alone_and_a_failure_is_gone_on_from(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(folder=SimpleNamespace(path=tmp_path), given=config_of("push_to_hub=me/traces"))

    def push(folder, repository, **keywords):
        calls.append((folder, repository, keywords))
        return "address"

    monkeypatch.setattr(traces.run, "push_folder", push)
    traces.run._push(run, "me/traces")
    assert calls == [(tmp_path, "me/traces", {"private": True, "kind": "dataset", "files": DATASET_FILES})]

    def refuse(*_, **__):
        raise UserError("me/traces was not uploaded", expected="a token", remedy="hf upload")

    monkeypatch.setattr(traces.run, "push_folder", refuse)
    with pytest.raises(StoppedError, match="the same command uploads them"):
        traces.run._push(run, "me/traces")


# A whole collection, in processes of their own

WORDS = ("num_questions=40", "num_samples=3", "questions_per_chunk=4", "generation_aggregation_steps=4")


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "train.py", "--config-name=collect_traces_tiny", f"output_dir={folder}", *WORDS, *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted collection, with a judge."""
    folder = tmp_path_factory.mktemp("traces") / "whole"
    subprocess.run(command(folder, "judge_model=tiny"), cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


def traces_in(folder: Path) -> set[str]:
    table = pd.read_parquet(folder / "traces.parquet").drop(columns="judge_log_prob_mean", errors="ignore")
    return {json.dumps(row, sort_keys=True) for row in table.to_dict("records")}


@pytest.mark.slow
def test_a_collection_leaves_its_traces_card_and_summary(whole):
    summary = json.loads((whole / "summary.json").read_text())
    table = pd.read_parquet(whole / "traces.parquet")
    assert len(table) == 120 and len(table.drop_duplicates(["row", "sample"])) == 120
    assert (table.groupby("row")["chosen"].sum() <= 1).all()
    lines = [json.loads(line) for line in (whole / "traces.jsonl").read_text().splitlines()]
    assert len(lines) == summary["chosen"] == int(table["chosen"].sum()) > 30
    assert not (whole / "chunks").exists() and "traces.jsonl" in (whole / "README.md").read_text()
    for figure in ("unprocessed_answer_log_prob_mean", "judge_log_prob_mean", "honest"):
        found = summary["best_of_n"][figure]
        assert found["best"] > found["random"], figure
    # The judge is the student that ranks here. It reads the text: a few were not sampled in the text's own tokens.
    apart = (table["unprocessed_answer_log_prob_mean"] - table["judge_log_prob_mean"]).abs()
    assert (apart < 1e-3).mean() > 0.9


@pytest.mark.slow
def test_a_collection_that_is_killed_anywhere_ends_with_the_same_traces(whole, tmp_path):
    """kill -9 at five random moments, most of them between the first chunk and the last."""
    folder, chance = tmp_path / "killed", random.Random(int(os.environ.get("RLT_SEED", "0")))
    log = (tmp_path / "out").open("w")
    num_chunks = 10
    for wanted in sorted(chance.sample(range(num_chunks), 5)):
        process = subprocess.Popen(command(folder), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((folder / "chunks").glob("chunk_*"))) >= wanted and (folder / "config.yaml").exists():
                time.sleep(chance.random() * 0.5)
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(folder), cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert (folder / "summary.json").exists() and not (tmp_path / "killed.1").exists()
    assert traces_in(folder) == traces_in(whole)
