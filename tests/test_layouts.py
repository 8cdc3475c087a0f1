"""Every layout in which datasets write questions and solutions gives the same rows, and none is read half."""

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from core.errors import UserError
from core.log import log
from data.dataset import load_rows, prepare_datasets
from data.embedded.tokenizer import build_tokenizer
from data.formats import PromptFormat
from data.masked_diffusion import prepare_samples
from data.tags import TAG_STYLES
from schemas.compose import compose_run_config
from schemas.data import DataConfig
from schemas.run import ConfigError, load_run_config

PLAIN = [{"question": f"What is {i} + 1?", "solution": str(i + 1)} for i in range(1, 9)]
TRACED = [{**row, "reasoning_trace": f"one more than {i}"} for i, row in enumerate(PLAIN, start=1)]


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="rlt")


def load(path: Path, **options: Any) -> list[dict[str, str]]:
    config = DataConfig(dataset_id_or_path=str(path), **options)
    return load_rows(config, config.dataset_id_or_path, TAG_STYLES[config.tag_format], seed=0)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question: str, answer: str, *, system: bool = False, speaker: str = "role", content: str = "content"):
    names = ("human", "gpt") if speaker == "from" else ("user", "assistant")
    turns = [{speaker: names[0], content: question}, {speaker: names[1], content: answer}]
    return [{speaker: "system", content: "Be kind."}, *turns] if system else turns


def think(row: dict[str, str], opening: str = "<think>") -> str:
    return f"{opening}{row['reasoning_trace']}</think>\n\n{row['solution']}"


def tagged(row: dict[str, str], style: str) -> str:
    tags = TAG_STYLES[style]
    return tags.thought.wrap(row["reasoning_trace"]) + "\n\n" + tags.solution.wrap(row["solution"])


# name: (a row of the layout, from a row; which rows it gives)
LAYOUTS: dict[str, tuple[Callable[[dict[str, str]], dict[str, Any]], list[dict[str, str]]]] = {
    "columns": (lambda r: r, TRACED),
    "problem": (lambda r: {"problem": r["question"], "solution": r["solution"]}, PLAIN),
    "GSM8K": (
        lambda r: {"question": r["question"], "answer": f"{r['reasoning_trace']}\n#### {r['solution']}"},
        TRACED,
    ),
    "numbers": (lambda r: {"question": r["question"], "solution": int(r["solution"])}, PLAIN),
    "solution and an answer": (lambda r: r | {"answer": "another"}, TRACED),
    "solution in tags": (
        lambda r: r | {"solution": f"<|begin_of_solution|>{r['solution']}<|end_of_solution|>"},
        TRACED,
    ),
    "solution in tags of the other style": (
        lambda r: r | {"solution": f"<solution>{r['solution']}</solution>"},
        TRACED,
    ),
    "solution with a thought": (lambda r: {"question": r["question"], "solution": think(r)}, TRACED),
    "messages": (lambda r: {"messages": chat(r["question"], r["solution"])}, PLAIN),
    "messages with a system turn": (lambda r: {"messages": chat(r["question"], r["solution"], system=True)}, PLAIN),
    "messages of R1": (lambda r: {"messages": chat(r["question"], think(r))}, TRACED),
    "messages of R1, opened by its template": (lambda r: {"messages": chat(r["question"], think(r, ""))}, TRACED),
    "messages of R1 without a thought": (
        lambda r: {"messages": chat(r["question"], "<think>\n\n</think>\n\n" + r["solution"])},
        PLAIN,
    ),
    "conversations in bespoke tags": (
        lambda r: {"conversations": chat(r["question"], tagged(r, "bespoke"), speaker="from", content="value")},
        TRACED,
    ),
    "conversations in angle tags": (
        lambda r: {"conversations": chat(r["question"], tagged(r, "r1"), system=True, speaker="from", content="value")},
        TRACED,
    ),
    "TRL's prompt": (lambda r: r | {"prompt": chat(r["question"], "")[:1], "question": None}, TRACED),
    "TRL's prompt with a system turn": (
        lambda r: {"prompt": chat(r["question"], "", system=True)[:2], "solution": r["solution"]},
        PLAIN,
    ),
    "TRL's prompt and completion": (
        lambda r: {"prompt": chat(r["question"], "")[:1], "completion": chat("", think(r))[1:]},
        TRACED,
    ),
    "TRL's plain prompt and completion": (
        lambda r: {"prompt": r["question"], "completion": r["solution"]},
        PLAIN,
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_rows_and_trains(name: str, kind: str, tmp_path: Path) -> None:
    make, expected = LAYOUTS[name]
    rows, path = [make(row) for row in TRACED], tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    assert load(path) == expected
    config = DataConfig(dataset_id_or_path=str(path), num_eval_prompts=1)
    train, held_out = prepare_datasets(config, build_tokenizer(), PromptFormat.from_styles("bespoke", "short"), seed=0)
    prepared = [{key: row[key] for key in expected[0]} for row in [*train, *held_out]]
    assert sorted(map(str, prepared)) == sorted(map(str, expected))
    assert all(row["prompt"].count(row["solution"] + "<|end_of_solution|>") == 1 for row in train)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "json lines", "csv", "tsv"])
def test_every_text_file_is_read_packed_or_not_and_with_numbers_as_written(
    ending: str, packed: str, tmp_path: Path
) -> None:
    numbers = ["42", "42.0", "-0.50", "12345678901234567890123", "1e3"]
    rows = [f'{{"question": "line\\nand, \\"quote\\"", "solution": {number}}}' for number in numbers]
    path = tmp_path / f"x.{ending.removesuffix(' lines')}{packed}"
    opened = gzip.open if packed else open
    with opened(path, "wt", encoding="utf-8-sig", newline="") as file:
        if ending in ("csv", "tsv"):
            writer = csv.writer(file, delimiter="," if ending == "csv" else "\t")
            writer.writerows([("question", "solution"), *(('line\nand, "quote"', number) for number in numbers)])
        else:
            file.write("[" + ",\n".join(rows) + "]" if ending == "json" else "\n".join(rows) + "\n")
    assert load(path) == [{"question": 'line\nand, "quote"', "solution": number} for number in numbers]


def test_numbers_of_a_parquet_column_are_written_without_what_the_column_adds(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "gaps": pyarrow.array([42.0, 0.1], pyarrow.float64()),
        "single": pyarrow.array([42.0, 0.1], pyarrow.float32()),
        "exact": pyarrow.array([Decimal("42.00"), Decimal("0.10")]),
        "whole": pyarrow.array([42, -1], pyarrow.int8()),
    }
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b"], **columns}), path)
    found = {name: [row["solution"] for row in load(path, column_names={"solution": name})] for name in columns}
    assert found == {
        "gaps": ["42", "0.1"],
        "single": ["42", "0.1"],
        "exact": ["42.00", "0.10"],
        "whole": ["42", "-1"],
    }


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "1+1", "a": 2, "why": "so", "question": "x", "messages": "x"}])
    names = {"question": "q", "solution": "a", "reasoning_trace": "why"}
    assert load(path, column_names=names) == [{"question": "1+1", "solution": "2", "reasoning_trace": "so"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"talk": chat("1+1", "2"), "messages": "x"}])
    assert load(path, column_names={"messages": "talk"}) == [{"question": "1+1", "solution": "2"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "1+1", "answer": "2"}])
    assert load(path, column_names={"question": "q"}) == [{"question": "1+1", "solution": "2"}]


def test_an_unknown_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "1+1", "a": "2"}, {"q": "1+1", "b": "2"}])
    with pytest.raises(UserError, match=r"(?s)`column_names.question` is `Q`, and `.*x.jsonl`.*one of q, a, b"):
        load(path, column_names={"question": "Q"})
    with pytest.raises(UserError, match="line 2: `a` is missing"):  # of one row alone it is the row's fault
        load(path, column_names={"question": "q", "solution": "a"})


@pytest.mark.parametrize(
    ("dataset", "names", "message"),
    [
        ("x.jsonl", {"text": "q"}, "names text, which this run does not read"),
        ("x.jsonl", {"messages": "q", "solution": "a"}, "`messages` beside `question` or `solution`"),
        ("arithmetic", {"question": "q"}, "the embedded task has no columns"),
    ],
)
def test_a_name_without_effect_is_refused(dataset: str, names: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", PLAIN)
    config = DataConfig(dataset_id_or_path=str(path) if dataset == "x.jsonl" else dataset, column_names=names)
    with pytest.raises(UserError, match=message):
        load_rows(config, config.dataset_id_or_path, TAG_STYLES["bespoke"], seed=0)


def test_names_of_columns_are_settings_of_a_run() -> None:
    words = ["column_names.question=q", "column_names.solution=a"]
    assert load_run_config(compose_run_config("teacher_rlt_tiny", words)).column_names == {
        "question": "q",
        "solution": "a",
    }
    with pytest.raises(ConfigError, match="`column_names.kwestion` is 'kwestion'. Input should be 'question', "):
        load_run_config(compose_run_config("teacher_rlt_tiny", ["column_names.kwestion=q"]))


def test_the_text_of_pretraining_may_have_another_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"article": f"An article, number {i}."} for i in range(10)])
    words = [f"dataset_id_or_path={path}", "objective=pretrain", "max_prompt_length=1", "response_multiple=1"]

    def prepare(*more: str) -> int:
        config = load_run_config(compose_run_config("llada_tiny", [*words, *more]))
        return len(prepare_samples(config, build_tokenizer(), PromptFormat.from_config(config), seed=0)[0])

    assert prepare("column_names.text=article") >= 8
    with pytest.raises(UserError, match=r"(?s)has no field `text` with a text.*texts in the field `text`"):
        prepare()
    with pytest.raises(UserError, match="(?s)`column_names.text` is `body`.*one of article"):
        prepare("column_names.text=body")
    with pytest.raises(UserError, match="names question, which this run does not read"):
        prepare("column_names.question=article")


def test_what_is_taken_off_is_counted_in_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solution = "<|begin_of_solution|>4<|end_of_solution|>"
    rows = [
        *[{"question": "q", "solution": solution}] * 3,
        {"messages": [*chat("q", "4", system=True), *chat("and then?", "5")]},
        {"question": "q", "solution": "<think>hm</think>4", "reasoning_trace": "ha"},
        {"question": "q", "answer": "2+2\n#### 4"},
    ]
    assert {row["solution"] for row in load(write_jsonl(tmp_path / "x.jsonl", rows))} == {"4"}
    for note in (
        "3 of 6 rows of `.*`: the tags around the solution are removed",
        "1 of 6 rows of `.*`: the system turn is left out",
        "1 of 6 rows of `.*`: turns behind the first answer are left out",
        "1 of 6 rows of `.*`: the thought in front of the solution is left out",
        "1 of 6 rows of `.*`: the solution is what follows `####`",
    ):
        assert len([line for line in caplog.messages if re.search(note, line)]) == 1, note


@pytest.mark.parametrize(
    "solution",
    [
        "Write <solution>4</solution> there.",
        "#### Sum\n4",
        "## A heading\n#### Another\nand text",
        "x #### 4",
        "Put it between <think> and </think>.",
        "<solution>1</solution> or <solution>2",
    ],
)
def test_a_solution_that_only_looks_like_a_layout_stays_as_it_is(solution: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "solution": solution}])
    assert load(path) == [{"question": "q", "solution": solution}]


def test_a_folder_of_packed_files_is_read_and_an_unusable_one_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for name in ("a.tar.gz", "b.tar.gz", "c.txt.gz", "README.md", "LICENSE"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert "holds no data file, but 2 .tar.gz, 1 without an ending, 1 .md, 1 .txt.gz, 1 .json" in str(error.value)
    for number, rows in enumerate((PLAIN[:4], PLAIN[4:])):
        with gzip.open(tmp_path / f"train-{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    assert load(tmp_path) == PLAIN


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "not packed": ("x.jsonl.gz", b'{"question": "q"}', "Not a gzipped file"),
    "cut": ("x.csv.gz", gzip.compress(b"question,solution\n" + b"q,s\n" * 999)[:-12], "ended before"),
    "damaged": ("x.json.gz", gzip.compress(b"[]" * 9999)[:15] + b"\xff" * 40, "while decompressing|ended before"),
    "not UTF-8": ("x.tsv", "question\tsolution\nWarum?\tdafür\n".encode("latin-1"), "codec can't decode"),
    "quotes": ("x.csv", b'question,solution\nq,s\nq,"s\n', "row 2: unexpected end of data"),
    "a list cut short": ("x.json", b'[{"question": "q", "solution": "s"},\n', "line 2 column 1"),
    "one object": ("x.json", b'{"rows":\n [{"question": "q", "solution": "s"}]}', "holds one JSON dict"),
    "an ending that is none": ("x.txt.gz", gzip.compress(b"q"), "has the ending `.txt.gz`"),
    "more fields than the header": ("x.csv", b"question,solution\nWell, q,s\n", "row 1: has 1 more fields"),
    "fewer fields than the header": ("x.csv", b"question,solution\nq\n", "row 1: `solution` is missing"),
    "another separator": ("x.csv", b"question;solution\nq;s\n", r"the fields are question;solution\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_clear_message(name: str, tmp_path: Path) -> None:
    file_name, content, message = MALFORMED[name]
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / file_name)
    assert file_name in str(error.value) and "remedy" in str(error.value)
