"""Rows from any source are checked one by one; nothing is cut or dropped in silence."""

import csv
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from core.errors import UserError
from core.log import log
from data.dataset import load_rows, prepare_datasets
from data.formats import TAG_STYLES, PromptFormat, encode
from schemas.data import DataConfig
from tests.helpers.golden import golden_tokenizer

GOOD = [{"question": f"What is {i} + 1?", "solution": f"It is {i + 1}."} for i in range(10)]
BESPOKE = PromptFormat.from_styles("bespoke", "short")


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "propagate", True)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str | Path, **options) -> list[dict[str, str]]:
    config = DataConfig(dataset_id_or_path=str(path), **options)
    return load_rows(config, config.dataset_id_or_path, TAG_STYLES[config.tag_format], seed=0)


def prepare(path: str | Path, **options):
    config = DataConfig(dataset_id_or_path=str(path), **options)
    return prepare_datasets(config, golden_tokenizer(), BESPOKE, seed=0)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved", "saved dict"])
def test_every_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(path, GOOD)
        case "json":
            path.write_text(json.dumps(GOOD))
        case "csv":
            write_csv(path, GOOD)
        case "parquet":
            Dataset.from_list(GOOD).to_parquet(path)
        case "folder":
            path.mkdir()
            write_jsonl(path / "train-00000.jsonl", GOOD[:4])
            write_csv(path / "train-00001.csv", GOOD[4:])
            write_jsonl(path / "test.jsonl", [{"question": "held", "solution": "out"}])
        case "saved":
            Dataset.from_list(GOOD).save_to_disk(path)
        case "saved dict":
            DatasetDict({"train": Dataset.from_list(GOOD), "test": Dataset.from_list(GOOD[:1])}).save_to_disk(path)
    assert load(path) == GOOD


def test_prompt_is_another_name_of_question_and_a_trace_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "solution": "s", "reasoning_trace": "t", "other": 3}, {"prompt": "p", "solution": "s"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert load(path) == [
        {"question": "q", "solution": "s", "reasoning_trace": "t"},
        {"question": "p", "solution": "s"},
    ]
    train, _ = prepare(path, num_eval_prompts=0)
    assert train["reasoning_trace"] == ["t", None]


def test_conversations_are_split_by_their_tags_and_keep_their_padding(tmp_path: Path) -> None:
    for thought, solution in ((s.thought, s.solution) for s in TAG_STYLES.values()):
        answer = thought.wrap("\n\nhm\n\n") + "\n\n" + solution.wrap("\n\n4\n\n")
        turns = [{"from": "user", "value": "2+2"}, {"from": "assistant", "value": answer}]
        path = write_jsonl(tmp_path / "x.jsonl", [{"system": "...", "conversations": turns}])
        assert load(path) == [{"question": "2+2", "solution": "\n\n4\n\n", "reasoning_trace": "\n\nhm\n\n"}]


BAD_ROWS = {
    "missing": ({"question": "q"}, "`solution` is missing"),
    "null": ({"question": None, "solution": "s"}, "`question` is missing"),
    "blank": ({"question": "q", "solution": " \n"}, "`solution` is empty"),
    "no text": ({"question": "q", "solution": True}, "`solution` is of type bool, not a text"),
    "not a number": ('{"question": "q", "solution": NaN}\n', "`solution` is missing"),
    "tag": ({"question": "q", "solution": "4<|end_of_solution|>"}, "the tag <|end_of_solution|> is inside `solution`"),
    "not an object": ([1], "is of type list, not an object"),
    "not JSON": ("{oops\n", "is not JSON"),
    "one turn": ({"conversations": [{"from": "user", "value": "q"}]}, "`conversations` has turns"),
    "no turns": ({"conversations": "q"}, "`conversations` is not a list of turns"),
    "roles": ({"conversations": [{"from": "system", "value": "q"}] * 2}, "`conversations` has turns"),
    "no content": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
        "`messages` has a turn without content",
    ),
    "an endless thought": ({"question": "q", "solution": "<think>hm"}, "`solution` opens its thought with <think> and"),
    "a thought alone": ({"question": "q", "answer": "<think>hm</think>\n"}, "`answer` has nothing behind its thought"),
    "two turns": (
        {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "solution": "s"},
        "`prompt` has turns of ['user', 'assistant'], not one of the user",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_reason(name: str, tmp_path: Path, caplog) -> None:
    bad, reason = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "x.jsonl", [*GOOD[:2], bad, *GOOD[2:]])
    with pytest.raises(UserError) as error:
        load(path)
    assert f"x.jsonl line 3: {reason}" in str(error.value)
    with caplog.at_level(logging.WARNING, logger="rlt"):
        assert load(path, max_bad_rows_frac=0.1) == GOOD
    assert "1 of 11 rows" in caplog.text and "line 3" in caplog.text


def test_tags_of_another_style_are_ordinary_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "solution": "as <solution>4</solution>"}])
    assert load(path)[0]["solution"] == "as <solution>4</solution>"
    with pytest.raises(UserError, match="<solution>"):
        load(path, tag_format="r1")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "absent.jsonl",
        lambda folder: folder / "absent",
        lambda folder: "./absent",
        lambda folder: folder,
        lambda folder: write_jsonl(folder / "empty.jsonl", []),
        lambda folder: write_jsonl(folder / "x.txt", GOOD),
        lambda folder: write_jsonl(folder / "x.parquet", GOOD),
        lambda folder: write_jsonl(folder / "x.json", ["{"]),
        lambda folder: write_jsonl(folder / "y.json", ["{}"]),
    ],
    ids=["file", "folder", "relative", "empty folder", "empty", "ending", "broken parquet", "broken json", "no list"],
)
def test_an_unreadable_dataset_is_one_clear_error(make, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load(make(tmp_path))


def test_an_unknown_split_lists_those_that_exist(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", GOOD)
    with pytest.raises(UserError, match="one of test"):
        load(tmp_path)
    assert load(tmp_path, dataset_split="test") == GOOD


def test_prompts_are_the_formats_and_whole(tmp_path: Path) -> None:
    train, held_out = prepare(write_jsonl(tmp_path / "x.jsonl", GOOD), num_eval_prompts=0)
    assert held_out is None and train.num_rows == len(GOOD)
    for row in train:
        assert row["prompt"] == BESPOKE.teacher_prompt_text(golden_tokenizer(), row["question"], row["solution"])


def test_a_prompt_that_is_too_long_is_dropped_and_reported_never_cut(tmp_path: Path, caplog) -> None:
    long = {"question": "why " * 50, "solution": "so"}
    path = write_jsonl(tmp_path / "x.jsonl", [*GOOD, long])
    limit = max(len(encode(golden_tokenizer(), BESPOKE.teacher_prompt_text(golden_tokenizer(), **row))) for row in GOOD)
    with caplog.at_level(logging.WARNING, logger="rlt"):
        train, _ = prepare(path, num_eval_prompts=0, max_prompt_length=limit)
    assert train["question"] == [row["question"] for row in GOOD]
    assert f"1 of 11 rows of `{path}` have prompts above {limit} tokens" in caplog.text
    with pytest.raises(UserError, match="raise max_prompt_length"):
        prepare(path, num_eval_prompts=0, max_prompt_length=5)


def test_held_out_questions_are_not_trained_on_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [*GOOD, *({**row, "solution": "another wording"} for row in GOOD)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    train, held_out = prepare(path, num_eval_prompts=2)
    again = prepare(path, num_eval_prompts=2)[1]
    assert held_out["question"] == again["question"] and held_out.num_rows == 2
    assert not set(train["question"]) & set(held_out["question"])
    assert train.num_rows == 16
    config = DataConfig(dataset_id_or_path=path, num_eval_prompts=2)
    by_seed = {tuple(prepare_datasets(config, golden_tokenizer(), BESPOKE, seed)[1]["question"]) for seed in range(5)}
    assert len(by_seed) > 1


def test_a_small_dataset_gives_at_most_a_fifth_for_evaluation(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="rlt"):
        train, held_out = prepare(write_jsonl(tmp_path / "x.jsonl", GOOD))
    assert (train.num_rows, held_out.num_rows) == (8, 2)
    assert "2 of 10 questions are held out instead of num_eval_prompts=64" in caplog.text
    train, held_out = prepare(write_jsonl(tmp_path / "x.jsonl", GOOD[:1]))
    assert train.num_rows == 1 and held_out is None


def test_an_evaluation_dataset_takes_its_questions_out_of_training(tmp_path: Path) -> None:
    eval_path = write_jsonl(tmp_path / "eval.jsonl", GOOD[:3])
    path = write_jsonl(tmp_path / "x.jsonl", GOOD)
    train, held_out = prepare(path, eval_dataset_id_or_path=eval_path)
    assert sorted(held_out["question"]) == [row["question"] for row in GOOD[:3]]
    assert train["question"] == [row["question"] for row in GOOD[3:]]
    with pytest.raises(UserError, match="also held out"):
        prepare(path, eval_dataset_id_or_path=path)


def test_the_embedded_task_is_a_dataset() -> None:
    train, held_out = prepare("arithmetic", prompt_style="short", num_eval_prompts=16)
    assert held_out.num_rows == 16 and train.num_rows > 1000
    assert not set(train["question"]) & set(held_out["question"])
    assert set(train.column_names) == {"prompt", "prompt_ids", "question", "solution", "reasoning_trace"}


def test_a_hub_dataset_that_cannot_be_reached_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be loaded"):
        load("nobody/has-this-dataset")
