"""What a run left, used again: the teacher explains, texts are scored, the adapter is merged."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import scoring.__main__ as scoring_command
from core.errors import UserError
from core.types import Role
from data.formats import PromptFormat
from generation.teacher import load_teacher
from models import merge
from models.load import load_base
from models.trained import open_run
from scoring.texts import TextScorer, score_texts
from scoring.with_models import score_with_models
from scoring.written import WrittenExplanationError, as_completion
from tests.helpers.tiny_run import make_trainer, write_random_model

QUESTIONS, SOLUTIONS = ["1+0+5+5+2", "7+4+7-2-9", "3-3+1+1+1"], ["=3", "=7", "=3"]
EXPLANATIONS = ["1+0=1;1+5=6;", "ans 7;", "it is easy;"]
FORMAT = PromptFormat.from_styles("bespoke", "short")
OPENING, CLOSING = FORMAT.tags.explanation.opening, FORMAT.tags.explanation.closing
SOLUTION_SECTION = FORMAT.tags.solution.wrap("=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("student"), seed=1)


def trained(base: Path, student: Path, folder: Path, *words: str):
    settings = ("max_steps=2", "save_steps=1", "eval_strategy=no", "learning_rate=0.02", f"student_model={student}")
    trainer = make_trainer(base, folder, *settings, *words)
    trainer.train()
    trainer.finish()
    return trainer


@pytest.fixture(scope="module")
def float_run(base, student, tmp_path_factory):
    """A run without quantisation, so that every forward of the same model is the same to the last digits."""
    folder = tmp_path_factory.mktemp("float") / "run"
    return trained(base, student, folder, "model_args.load_in_8bit=false", "model_args.torch_dtype=float32"), folder


@pytest.fixture(scope="module", params=["load_in_8bit", "load_in_4bit"])
def quantised_run(request, base, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "run"
    four = str(request.param == "load_in_4bit").lower()
    words = (f"model_args.load_in_8bit={str(four == 'false').lower()}", f"model_args.load_in_4bit={four}")
    trained(base, student, folder, *words)
    return folder


# The teacher


def test_a_loaded_teacher_explains_as_the_policy_that_was_trained(float_run):
    trainer, folder = float_run
    prompts = [
        FORMAT.teacher_prompt_text(trainer.processing_class, q, s) for q, s in zip(QUESTIONS, SOLUTIONS, strict=True)
    ]
    prompt_ids = trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]
    teacher = load_teacher(folder)
    texts = teacher.explain(QUESTIONS, SOLUTIONS, seed=3)
    completions = trainer.sampler.generator.generate(prompt_ids, 1, [3 * 1_000_003 + row for row in range(3)])
    for text, completion in zip(texts, completions, strict=True):
        written = trainer.processing_class.decode(completion.token_ids)
        assert text and (written.startswith(text) or "�" in text)
    assert teacher.explain(QUESTIONS[0], SOLUTIONS[0], seed=3) == texts[0]
    assert teacher.explain(QUESTIONS, SOLUTIONS, seed=4) != texts
    assert load_teacher(folder / "checkpoint-1").explain(QUESTIONS, SOLUTIONS, seed=3) != texts
    assert teacher.sampling.temperature == trainer.config.grpo.temperature
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_run_that_did_not_end_is_read_from_its_last_checkpoint(float_run, tmp_path):
    _, folder = float_run
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    with pytest.raises(UserError, match="holds no trained adapter"):
        open_run(tmp_path, needs_adapter=True)
    (tmp_path / "checkpoint-2").symlink_to(folder / "checkpoint-2")
    assert open_run(tmp_path, needs_adapter=True).adapter == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("results/none", "neither a folder nor a run configuration"),
        (".", "is not the folder of a run: it holds no config.yaml"),
        ("teacher_rlt_tiny", "holds no trained adapter"),
        ("llada_tiny", "is a run of the method masked_diffusion"),
    ],
)
def test_what_is_no_trained_teacher_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_teacher(name)


def test_questions_that_cannot_be_asked_are_named(float_run):
    teacher = load_teacher(float_run[1])
    for questions, solutions, message in (
        (["q"], ["s", "t"], "1 questions and 2 solutions"),
        (["q", " "], ["s", "t"], "question 1 is empty"),
        (["q"], [SOLUTION_SECTION], r"solution 0 holds the tag <\|begin_of_solution\|>"),
        ("q", ["s"], "one text and a list"),
    ):
        with pytest.raises(UserError, match=message):
            teacher.explain(questions, solutions)


# Scores


def test_texts_get_the_reward_of_the_runs_own_models(float_run):
    trainer, folder = float_run
    scores = score_texts(QUESTIONS, SOLUTIONS, EXPLANATIONS, run=folder)
    with trainer.host.acting_as(Role.TEACHER) as teacher:
        expected = score_with_models(
            QUESTIONS,
            SOLUTIONS,
            EXPLANATIONS,
            teacher=teacher,
            student=trainer.host.student,
            tokenizer=trainer.processing_class,
            prompt_format=FORMAT,
            reward_config=trainer.config,
            temperature=trainer.config.grpo.temperature,
        )
    for name, values_B in {"reward": expected.reward, **expected.terms}.items():
        assert scores[name].tolist() == pytest.approx(values_B.tolist(), abs=2e-4), name
    assert scores["problem"].isna().all() and list(scores["explanation"]) == EXPLANATIONS


def test_without_an_adapter_the_teacher_is_the_base(float_run, tmp_path):
    """As it is for the name of a run configuration; the trained adapter makes another KL of the same texts."""
    scorer = TextScorer(float_run[1])
    trained_kl = scorer.score(QUESTIONS, SOLUTIONS, EXPLANATIONS)["reasoning_kl_mean"]
    with scorer._host.teacher.disable_adapter():
        base_kl = scorer.score(QUESTIONS, SOLUTIONS, EXPLANATIONS)["reasoning_kl_mean"]
    (tmp_path / "config.yaml").write_text((float_run[1] / "config.yaml").read_text())
    bare_kl = score_texts(QUESTIONS, SOLUTIONS, EXPLANATIONS, run=tmp_path)["reasoning_kl_mean"]
    assert bare_kl.tolist() == pytest.approx(base_kl.tolist(), abs=1e-4)
    assert (trained_kl - base_kl).abs().max() > 1e-3
    assert open_run("teacher_rlt_tiny").adapter is None


def test_the_ways_to_write_an_explanation_mean_the_same_completion():
    ways = [
        "why",
        f"why{CLOSING}",
        f"why{CLOSING}<|im_end|>\nmore",
        f"{OPENING}\n\nwhy{CLOSING}",
        f"{OPENING}why",
        "\n\nwhy",
    ]
    ways += [f"{SOLUTION_SECTION}\n\n{OPENING}\n\nwhy{CLOSING}<|im_end|>"]
    assert {as_completion(way, "=3", FORMAT, ["<|im_end|>"]) for way in ways} == {f"why{CLOSING}"}
    assert as_completion(f"\n\nwhy{CLOSING}", "=3", FORMAT, []) == f"\n\nwhy{CLOSING}"
    assert as_completion("why", "=3", FORMAT, [], close=False) == "why"


WRONG = {
    "<think>why</think>": "tags of another format",
    "why</explanation>": "tags of another format",
    "<|begin_of_thought|>why<|end_of_thought|>": "<|begin_of_thought|> is inside",
    f"{FORMAT.tags.solution.wrap('=4')}{OPENING}why{CLOSING}": "not the solution's section",
    f"{OPENING}why{OPENING}": "is inside",
    "why<|im_end|>": "special token <|im_end|>",
}


@pytest.mark.parametrize("text", [*WRONG, None, 3.5])
def test_a_text_in_another_format_is_no_explanation(text):
    with pytest.raises(WrittenExplanationError) as raised:
        as_completion(text, "=3", FORMAT, ["<|im_end|>"])
    assert WRONG.get(text, "not a text") in str(raised.value)


def test_rows_that_cannot_be_scored_keep_their_place_and_say_why(float_run, caplog):
    texts = [EXPLANATIONS[0], *WRONG, None, EXPLANATIONS[0]]
    scorer = TextScorer(float_run[1])
    scores = scorer.score(["1+0+5+5+2"] * len(texts), ["=3"] * len(texts), texts)
    good = scores["problem"].isna()
    assert good.tolist() == [True, *[False] * (len(texts) - 2), True]
    assert scores["reward"].notna().tolist() == good.tolist()
    assert scores["reward"].iloc[0] == pytest.approx(scores["reward"].iloc[-1], abs=1e-5)
    with pytest.raises(UserError, match="none of 2 rows can be scored"):
        scorer.score(["q", ""], ["=3", "=3"], ["<think>why</think>", "why"])
    with pytest.raises(UserError, match="a text in place of a list"):
        scorer.score("q", "s", "e")
    with pytest.raises(UserError, match="2 questions, 1 solutions"):
        scorer.score(["q", "q"], ["s"], ["e"])


def test_a_text_longer_than_the_model_reads_is_not_scored(float_run):
    scorer = TextScorer(float_run[1])
    scorer._host.teacher.config.max_position_embeddings = 60
    scores = scorer.score(["q", "q"], ["=3", "=3"], ["why", "why " * 20])
    assert scores["problem"].isna()[0] and "the teacher reads 60" in scores["problem"][1]


@pytest.fixture
def written(tmp_path):
    texts = [*EXPLANATIONS[:2], "<think>why</think>"]
    rows = [
        {"id": i, "question": QUESTIONS[i], "solution": SOLUTIONS[i], "explanation": text}
        for i, text in enumerate(texts)
    ]
    file = tmp_path / "explanations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return file


def test_the_command_scores_a_file_row_by_row(float_run, written, tmp_path):
    run = str(float_run[1])
    for target in (tmp_path / "scored.jsonl", tmp_path / "scored.parquet"):
        assert scoring_command.main([str(written), str(target), "--run", run]) == 0
        if target.suffix == ".jsonl":
            rows = [json.loads(line) for line in target.read_text().splitlines()]
        else:
            rows = pyarrow.parquet.read_table(target).to_pylist()
        assert [row["id"] for row in rows] == ["0", "1", "2", None]
        assert [row["problem"] is None for row in rows] == [True, True, False, False]
        expected = score_texts(QUESTIONS[:2], SOLUTIONS[:2], EXPLANATIONS[:2], run=run)
        for name in expected.columns.drop(["question", "solution", "explanation", "problem"]):
            assert [row[name] for row in rows[:2]] == pytest.approx(expected[name].tolist(), abs=1e-4)
            assert rows[2][name] is None
    renamed = tmp_path / "renamed.parquet"
    pd.read_parquet(tmp_path / "scored.parquet").rename(columns={"explanation": "text"}).to_parquet(renamed)
    assert scoring_command.main([str(renamed), str(tmp_path / "again.jsonl"), "--run", run, "--column", "text"]) == 0
    assert "explanation" not in json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("source", "target", "run", "message"),
    [
        ("missing.jsonl", "out.jsonl", "RUN", "there is no dataset"),
        ("explanations.jsonl", "out.csv", "RUN", "has the ending `.csv`"),
        ("explanations.jsonl", "none/out.jsonl", "RUN", "which is no folder"),
        ("explanations.jsonl", "explanations.jsonl", "RUN", "the input itself"),
        ("explanations.jsonl", "out.jsonl", "results/none", "neither a folder nor a run configuration"),
        ("other.jsonl", "out.jsonl", "RUN", "no explanations in a column `explanation` (the columns are question)"),
    ],
)
def test_a_wrong_call_is_status_2_and_writes_nothing(
    source, target, run, message, float_run, written, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"question": "q"}\n')
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert scoring_command.main([source, target, "--run", run.replace("RUN", str(float_run[1]))]) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


# The merged checkpoint


def test_the_merged_model_is_the_base_with_its_adapter(float_run, tmp_path):
    trainer, folder = float_run
    assert merge.main([str(folder), str(tmp_path / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), trainer.host.acting_as(Role.TEACHER) as teacher:
        adapted = teacher(ids).logits
        with teacher.disable_adapter():
            bare = teacher(ids).logits
        torch.testing.assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        assert (adapted - bare).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/teacher_prompt.txt").read_text() == FORMAT.teacher_prompt_template(tokenizer)
    assert model.generation_config.temperature == trainer.config.grpo.temperature
    assert merge.main([str(folder), str(tmp_path / "merged")]) == 2


def test_a_quantised_base_is_merged_as_the_trainer_multiplies_with_it_rounded_once(quantised_run, tmp_path):
    merge.merge_run(quantised_run, tmp_path / "merged")
    tensors = {}
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        tensors |= load_file(shard)
    config = open_run(quantised_run).config
    model = PeftModel.from_pretrained(
        load_base(config.model_name_or_path, config.model_args, torch.device("cpu")), quantised_run
    )
    factors = {name: p.float() for name, p in model.named_parameters() if ".lora_" in name}
    scale = config.model_args.lora_alpha / config.model_args.lora_r
    linears = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
    }
    assert len(linears) == 14 and all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    for name, linear in linears.items():
        if isinstance(linear, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
        else:
            weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        prefix = f"base_model.model.{name}"
        update = factors[f"{prefix}.lora_B.default.weight"] @ factors[f"{prefix}.lora_A.default.weight"] * scale
        expected = weight.float() + update
        assert update.abs().max() > 1e-3
        # bfloat16 has 8 significant bits: one rounding moves a value by at most 2 ** -9 of it.
        error = (tensors[f"{name}.weight"].float() - expected).abs()
        assert (error <= 2**-8 * expected.abs() + 1e-6).all()
