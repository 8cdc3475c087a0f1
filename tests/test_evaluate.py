"""evaluate: figures, answers, questions of each layout, and an evaluation that is killed and goes on."""

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean
from string import ascii_uppercase

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import evaluation.run
from core.errors import UserError
from data.embedded.task import STUDENT_SYSTEM_SHORT
from data.formats import PromptFormat
from data.layouts import BadRowError
from evaluation.answers import final_answer, is_right, last_boxed, stated_letter
from evaluation.engine import MERGED_FOLDER
from evaluation.questions import encoded_prompts, load_questions, with_choices
from evaluation.statistics import bootstrap, pass_at_k, which_k
from generation.base import SamplingSettings
from generation.transformers_engine import TransformersGenerator
from models.load import load_tokenizer
from models.trained import open_model
from planner.evaluate import base_of
from planner.planned import plan_config
from planner.shapes import load_shape
from preflight.inputs import check_inputs
from schemas.compose import compose_run_config
from schemas.model import ModelArgs
from schemas.run import ConfigError, load_run_config
from tests.helpers.command import ROOT
from tests.helpers.tiny_run import make_trainer, write_random_model
from trainers.start import train_runs

FORMAT = PromptFormat.from_styles("bespoke", "short")
SMALL = ("num_eval_prompts=24", "generation_aggregation_steps=4", "max_completion_length=6", "num_samples=3")


def load(*words: str, name: str = "evaluate_tiny"):
    return load_run_config(compose_run_config(name, words))


# Statistics


@pytest.mark.parametrize("num_samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_drawings_with_a_right_answer(num_samples):
    for num_right, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        answers = [True] * num_right + [False] * (num_samples - num_right)
        expected = mean(any(drawn) for drawn in itertools.combinations(answers, k))
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


def test_pass_at_k_has_no_bias():
    """Its mean over what n samples may show is the chance of k fresh ones; that of the plug-in formula is not."""
    n, k, p = 6, 3, 0.3
    chances = [np.prod([p if right else 1 - p for right in rights]) for rights in itertools.product([1, 0], repeat=n)]
    counts = [sum(rights) for rights in itertools.product([1, 0], repeat=n)]
    expected = sum(chance * pass_at_k(n, c, k) for chance, c in zip(chances, counts, strict=True))
    assert expected == pytest.approx(1 - (1 - p) ** k)
    plugged = sum(chance * (1 - (1 - c / n) ** k) for chance, c in zip(chances, counts, strict=True))
    assert abs(plugged - expected) > 0.01
    with pytest.raises(ValueError, match="pass@7 of 6"):
        pass_at_k(6, 1, 7)
    assert [which_k(n) for n in (1, 2, 4, 6, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_bootstrap_is_that_of_drawing_questions_one_by_one():
    rng = random.Random(0)
    values = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(60)]
    plain = sorted(mean(rng.choices(values, k=len(values))) for _ in range(20_000))
    found = bootstrap(values, seed=1)
    assert found.mean == pytest.approx(mean(values))
    assert found.low == pytest.approx(plain[500], abs=0.01) and found.high == pytest.approx(plain[-500], abs=0.01)
    assert bootstrap(values, seed=1) == found
    constant = bootstrap([0.5] * 9, seed=0)
    assert (constant.low, constant.mean, constant.high) == (0.5, 0.5, 0.5)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [
        interval.low <= 0.3 <= interval.high
        for seed in range(200)
        for interval in [bootstrap(rng.binomial(4, 0.3, size=100) / 4, seed)]
    ]
    assert 0.9 <= mean(held) <= 0.99


# Answers


@pytest.mark.parametrize(
    ("solution", "answer", "right"),
    [
        ("42", r"so it is \boxed{42}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"70 \sqrt{2}", r"70\sqrt2", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"$(3, \pi/2)$", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("33", r"first \boxed{12}, in the end \boxed{33}", True),
        ("12", r"first \boxed{12}, in the end \boxed{33}", False),
        ("025", "25", True),
        ("6", "7", False),
        ("6", "no idea", False),
        ("6", "", False),
        ("6", None, False),
        ("6", "(" * 3000 + "6" + ")" * 3000, False),
        ("6", r"\boxed{9^9^9^9}", False),
    ],
)
def test_math_is_right_by_its_value(solution, answer, right):
    assert is_right(answer, solution, "math") is right


@pytest.mark.parametrize(
    "answer", ["C", "(C)", "**C**", "C. since A fails", r"\boxed{\text{C}}", "The answer is (C).", "C)"]
)
def test_a_choice_is_right_in_every_way_to_write_it(answer):
    assert stated_letter(answer) == "C" and is_right(answer, "C", "letter") and not is_right(answer, "B", "letter")


@pytest.mark.parametrize("answer", ["", "A lot of text", "I think so", "because", None])
def test_a_word_is_no_choice(answer):
    assert not any(is_right(answer, letter, "letter") for letter in ascii_uppercase)


def test_an_answer_without_tags_is_what_stands_at_its_end():
    assert final_answer("<think>\\boxed{1}</think>It is \\boxed{2{3}}.") == "2{3}"
    assert final_answer("First.\nThen.\n  7 \n") == "7"
    assert final_answer(" \n") is None and last_boxed("\\boxed{1") is None
    assert is_right(" =3 ", "=3", "exact") and not is_right("3", "=3", "exact")


# Questions: files of the published layouts, for no hub is asked

MATH_500 = {"problem": "What is $1+1$?", "solution": "It is 2, so \\boxed{2}.", "answer": "2", "subject": "Algebra"}
AIME = {"id": 60, "problem": "Find $n$.", "solution": "...", "answer": "204", "url": "u", "year": "2024"}
GPQA = {
    "Question": "Which one?\n",
    "Correct Answer": "right",
    **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    "Record ID": "rec",
    "Subdomain": "Physics",
}


def written(file: Path, rows: list[dict]) -> Path:
    if file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(("benchmark", "row", "solution"), [("math_500", MATH_500, "2"), ("aime_2024", AIME, "204")])
def test_the_final_answer_of_a_benchmark_is_the_solution_not_the_worked_one(benchmark, row, solution, ending, tmp_path):
    file = written(tmp_path / f"rows.{ending}", [row | {"problem": f"{row['problem']} {i}"} for i in range(5)])
    config = load(f"data_cfg={benchmark}", f"dataset_id_or_path={file}")
    questions = load_questions(config)
    assert len(questions) == 5 and {question.solution for question in questions} == {solution}
    assert all(question.text.startswith("Return your final response within \\boxed{}. ") for question in questions)
    assert config.scoring == "math"


def test_choices_are_lettered_in_an_order_that_the_seed_draws(tmp_path):
    file = written(tmp_path / "gpqa.jsonl", [GPQA | {"Question": f"Which of {i}?"} for i in range(40)])
    config = load("data_cfg=gpqa_diamond", f"dataset_id_or_path={file}")
    questions = load_questions(config)
    assert questions == load_questions(config) and config.scoring == "letter"
    for question in questions:
        lines = question.text.splitlines()[-4:]
        assert sorted(line[3:] for line in lines) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert f"{question.solution}) right" in lines
    assert {question.solution for question in questions} == set("ABCD")
    other = load("data_cfg=gpqa_diamond", f"dataset_id_or_path={file}", "seed=1")
    assert {q.text: q.solution for q in load_questions(other)} != {q.text: q.solution for q in questions}
    row = {"question": "q", "solution": "right"}
    with pytest.raises(BadRowError, match="no wrong answer in Incorrect Answer 2"):
        with_choices(row, GPQA | {"Incorrect Answer 2": None}, config.wrong_answer_columns, 0)


def test_any_layout_that_training_reads_is_asked(tmp_path):
    rows = [{"question": f"1+{i}+1+1+1", "solution": f"={i}", "reasoning_trace": "t"} for i in range(9)]
    file = written(tmp_path / "traces.jsonl", rows)
    questions = load_questions(load(f"dataset_id_or_path={file}", "num_eval_prompts=4"))
    assert len({question.text for question in questions}) == 4
    assert all(f"1{question.solution.replace('=', '+')}+1+1+1" == question.text for question in questions)


def test_prompts_are_the_students_or_the_chat_templates():
    config = load()
    tokenizer = load_tokenizer("tiny", ModelArgs())
    questions = load_questions(config)[:1]
    (student,) = encoded_prompts(questions, "student", config, tokenizer)
    assert tokenizer.decode(student) == FORMAT.student_head_text(tokenizer, questions[0].text)
    (chat,) = encoded_prompts(questions, "chat", config, tokenizer)
    assert tokenizer.decode(chat) == f"<|im_start|>user\n{questions[0].text}<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match="max_prompt_length is 5"):
        encoded_prompts(questions, "student", load("max_prompt_length=5"), tokenizer)


# Settings and plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models=[]"], "`models`"),
        (["models=[tiny,tiny]"], "names one twice"),
        (["prompt=[chat,student]"], "`prompt` has 2 entries for 1 models"),
        (["num_eval_prompts=0"], "nothing to ask"),
        (["wrong_answer_columns=[x]"], "Set scoring=letter"),
        (["num_samples=0"], "`num_samples` is 0"),
        (["eval_dataset_id_or_path=arithmetic"], "an evaluation's questions are those of `dataset_id_or_path`"),
        (["generator=vllm", "model_args.load_in_8bit=true"], "vLLM reads 16 bits here"),
        (["kv_cache_gb=2"], "with `generator` transformers"),
        (["model_args.adapter_path=x"], "name the adapter's folder in `models`"),
        (["learning_rate=1"], "`learning_rate` is not a setting"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(words, message):
    with pytest.raises(ConfigError, match=message):
        load(*words)


def test_the_plan_is_that_of_the_largest_model_and_its_cache():
    one = plan_config("evaluate_85gb", int(85e9))
    assert one.fits and one.plan.settings.teacher == load_shape("Qwen/Qwen2.5-7B-Instruct")
    words = ["models=[Qwen/Qwen2.5-0.5B-Instruct,Qwen/Qwen2.5-14B-Instruct,results/not/there/yet]"]
    several = plan_config("evaluate_85gb", int(85e9), words)
    assert several.plan.settings.teacher == load_shape("Qwen/Qwen2.5-14B-Instruct")
    assert several.plan.max_bytes <= int(85e9) and several.plan.kv_cache_bytes < one.plan.kv_cache_bytes
    shorter = plan_config("evaluate_85gb", int(85e9), ["max_completion_length=512"]).plan
    assert shorter.kv_cache_bytes == shorter.kv_needed_bytes < one.plan.kv_needed_bytes


# A whole evaluation


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A base, a run with an adapter on it, and a run of all weights."""
    folder = tmp_path_factory.mktemp("models")
    base = write_random_model(folder / "base")
    settings = (
        "max_steps=1",
        "save_steps=1",
        "eval_strategy=no",
        "learning_rate=0.05",
        "model_args.torch_dtype=float32",
    )
    trainer = make_trainer(base, folder / "rlt", *settings, "model_args.load_in_8bit=false")
    trainer.train()
    trainer.finish()
    sft = folder / "sft"
    write_random_model(sft, seed=1)
    words = (f"model_name_or_path={base}", f"output_dir={sft}", "run_name=sft")
    values = compose_run_config("student_sft_tiny", words)
    (sft / "config.yaml").write_text(json.dumps(values))
    return [base, folder / "rlt", sft]


def evaluated(models: list[Path], folder: Path, *words: str) -> Path:
    names = ",".join(map(str, models))
    values = compose_run_config("evaluate_tiny", [f"models=[{names}]", f"output_dir={folder}", *SMALL, *words])
    (run,) = train_runs([values])
    return run.folder


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    return evaluated(models, tmp_path_factory.mktemp("whole") / "run")


def test_figures_are_those_of_the_answers_in_the_table(models, whole):
    samples, results = pd.read_parquet(whole / "samples.parquet"), json.loads((whole / "evaluation.json").read_text())
    assert list(results["models"]) == [str(model) for model in models] and results["num_questions"] == 24
    tokenizer = load_tokenizer(str(models[0]), ModelArgs())
    for name, found in results["models"].items():
        rows = samples[samples["model"] == name]
        sampled, greedy = rows[rows["decoding"] == "sampled"], rows[rows["decoding"] == "greedy"]
        assert (len(sampled), len(greedy)) == (24 * 3, 24)
        assert found["pass@1"]["mean"] == pytest.approx(sampled["right"].mean())
        assert found["pass@3"]["mean"] == pytest.approx(sampled.groupby("question")["right"].any().mean())
        assert found["greedy"]["mean"] == pytest.approx(greedy["right"].mean())
        assert found["cut_off_frac"] == pytest.approx((rows["num_tokens"] == 6).mean(), abs=0.1)
        for row in rows.to_dict("records"):
            assert row["right"] == (f"{row['solution']}" == row["answer"])
            assert row["num_tokens"] >= 1 and tokenizer.encode(row["question"])
        assert rows["seed"][rows["decoding"] == "sampled"].nunique() == 24 * 3
    same = samples.groupby(["question", "decoding", "sample"])["seed"].nunique()
    assert (same == 1).all()  # models are compared on the same draws
    texts = {name: rows["text"].tolist() for name, rows in samples.groupby("model")}
    assert len({tuple(column) for column in texts.values()}) == 3
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["evaluation"] == results
    assert not (whole / "samples").exists() and not (whole / MERGED_FOLDER).exists()


def test_greedy_answers_are_those_of_the_models_own_greedy_decoding(models, whole):
    samples = pd.read_parquet(whole / "samples.parquet")
    rows = samples[(samples["model"] == str(models[0])) & (samples["decoding"] == "greedy")]
    tokenizer = load_tokenizer(str(models[0]), ModelArgs())
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    for row in rows.to_dict("records")[:6]:
        prompt = tokenizer(
            FORMAT.student_head_text(tokenizer, row["question"]), add_special_tokens=False, return_tensors="pt"
        )
        out = model.generate(**prompt, do_sample=False, max_new_tokens=6)
        assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == row["text"]


def test_the_likeliest_token_does_not_depend_on_the_seed(models):
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    sampling = SamplingSettings(temperature=0.0, max_new_tokens=5, stop_token_ids=())
    generator = TransformersGenerator(model, sampling, rows_per_call=4)
    first, second = (generator.generate([[5, 6, 7]], 2, seeds) for seeds in ([1, 2], [3, 4]))
    assert len({tuple(c.token_ids) for c in first + second}) == 1
    generator.sampling = SamplingSettings(temperature=1.0, max_new_tokens=5, stop_token_ids=())
    assert len({tuple(c.token_ids) for c in generator.generate([[5, 6, 7]], 4, [1, 2, 3, 4])}) > 1


def test_a_run_that_has_only_a_checkpoint_so_far_may_be_evaluated_and_not_trained_from(models, tmp_path):
    (tmp_path / "config.yaml").write_text((models[1] / "config.yaml").read_text())
    (tmp_path / "checkpoint-1").symlink_to(models[1] / "checkpoint-1")
    check_inputs(compose_run_config("evaluate_tiny", [f"models=[{tmp_path}]"]))
    found = open_model(tmp_path, ModelArgs())
    assert found.adapter == tmp_path / "checkpoint-1" and found.weights == str(models[0])
    assert base_of(str(tmp_path)) == base_of(str(models[1])) == str(models[0])
    with pytest.raises(UserError, match="holds no model"):
        check_inputs(compose_run_config("teacher_rlt_tiny", [f"model_name_or_path={tmp_path}"]))


class Killed(BaseException):
    """As nothing catches it, all that was not saved is lost."""


def test_an_evaluation_that_is_cut_off_goes_on_and_ends_as_one_that_was_not(models, whole, tmp_path, monkeypatch):
    """At five random chunks; files that a kill leaves half-written are there too."""
    folder, rng = tmp_path / "run", random.Random(3)
    save, asked = evaluation.run.SampleStore.save, []
    left = [0]

    def stopping(self, model, number, questions, table) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        asked.append((number, questions))
        save(self, model, number, questions, table)

    monkeypatch.setattr(evaluation.run.SampleStore, "save", stopping)
    for left[0] in (rng.randrange(5) for _ in range(5)):
        with pytest.raises(Killed):
            evaluated(models, folder)
        for file in list((folder / "samples").rglob("questions*.parquet"))[:1]:
            file.with_name(f".{file.name}.partial").write_bytes(b"half")
        (folder / MERGED_FOLDER).mkdir(exist_ok=True)
    left[0] = -1
    evaluated(models, folder)
    assert len(asked) == len(set(asked)) == 3 * 6  # no chunk twice
    results = [path.read_text() for path in (folder / "evaluation.json", whole / "evaluation.json")]
    assert results[0] == results[1]
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "samples.parquet"), pd.read_parquet(whole / "samples.parquet")
    )


def test_a_model_that_was_trained_again_is_asked_again(models, whole, tmp_path, monkeypatch):
    copies = [tmp_path / model.name for model in models[:1]]
    shutil.copytree(models[0], copies[0])
    run = partial(evaluated, copies, tmp_path / "run")
    monkeypatch.setattr(evaluation.run, "results_of", lambda samples, config: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    shutil.copy(models[2] / "model.safetensors", copies[0] / "model.safetensors")
    run()
    samples = pd.read_parquet(tmp_path / "run" / "samples.parquet")
    expected = pd.read_parquet(whole / "samples.parquet")
    assert samples["text"].tolist() == expected["text"][expected["model"] == str(models[2])].tolist()


@pytest.mark.parametrize("model", ["results/none/at/all", "empty"])
def test_a_model_that_is_not_there_is_named_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=model):
        evaluated([Path(model)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_serves_base_and_merged_adapter_and_answers_as_transformers_does(models, whole, tmp_path):
    folder = evaluated(models[:2], tmp_path / "run", "generator=vllm")
    found, expected = (pd.read_parquet(run / "samples.parquet") for run in (folder, whole))
    for model in map(str, models[:2]):
        texts = [
            table["text"][(table["model"] == model) & (table["decoding"] == "greedy")].tolist()
            for table in (found, expected)
        ]
        assert mean(a == b for a, b in zip(*texts, strict=True)) >= 0.9
        sampled = found[(found["model"] == model) & (found["decoding"] == "sampled")]
        assert len(sampled) == 72 and sampled["text"].nunique() > 36
    assert not (folder / MERGED_FOLDER).exists()


@pytest.mark.slow
def test_an_evaluation_that_is_killed_five_times_ends_as_one_that_was_not(tmp_path):
    """kill -9 of the command itself, at random moments of its sampling."""
    words = ["--config-name=evaluate_tiny", "models=[tiny_student]", "num_samples=8", "generation_aggregation_steps=8"]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"output_dir={tmp_path / 'run'}"]
    rng, chunks = random.Random(0), tmp_path / "run" / "samples"
    for _ in range(5):
        there = len(list(chunks.rglob("q*.parquet")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = there + rng.randrange(1, 8)
        while process.poll() is None and len(list(chunks.rglob("q*.parquet"))) < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (whole,) = train_runs([compose_run_config("evaluate_tiny", [*words[1:], f"output_dir={tmp_path / 'whole'}"])])
    files = [(folder / "evaluation.json").read_text() for folder in (tmp_path / "run", whole.folder)]
    assert files[0] == files[1]
    tables = [pd.read_parquet(folder / "samples.parquet") for folder in (tmp_path / "run", whole.folder)]
    pd.testing.assert_frame_equal(*tables)


# What the documents say


def test_the_calls_in_the_documents_are_valid():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    calls = re.findall(r"^python train.py --config-name=(\w+) (.*?)(?: {2,}#.*)?$", text, re.MULTILINE)
    assert len(calls) == 2
    for name, words in calls:
        assert load(*words.split(), name=name).models[1].startswith("results/student_sft")
    groups = re.findall(r"^\| `(\w+)` \| (?:`([\w/.-]+)`|held-out)", text, re.MULTILINE)
    shipped = {name: load(f"data_cfg={name}").dataset_id_or_path for name, _ in groups}
    assert [shipped[name] for name, _ in groups] == ["arithmetic", *(dataset for _, dataset in groups[1:])]
    assert len(groups) == 4


def test_the_task_for_another_harness_asks_as_a_student_is_asked():
    task = yaml.safe_load((ROOT / "examples" / "lm_eval" / "embedded.yaml").read_text())
    tokenizer, question = load_tokenizer("tiny", ModelArgs()), "1+0+5+5+2"
    messages = [{"role": "system", "content": STUDENT_SYSTEM_SHORT}, {"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat + task["gen_prefix"] == FORMAT.student_head_text(tokenizer, question)
    answer = "1+0=1;" + FORMAT.student_tail(tokenizer, question, "=3").text
    (until,) = task["generation_kwargs"]["until"]
    (pattern,) = (f["regex_pattern"] for f in task["filter_list"][0]["filter"] if f["function"] == "regex")
    assert re.findall(pattern, answer.partition(until)[0]) == ["=3"]
    assert STUDENT_SYSTEM_SHORT in (ROOT / "docs" / "evaluation.md").read_text()
