"""The embedded model: tokenizer, cache folder and the gate of the base."""

import multiprocessing
import os
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.embedded import model as tiny
from data.embedded.task import generate_rows
from data.formats import PromptFormat, encode

FORMAT = PromptFormat.from_styles("bespoke", "short")
ROW = generate_rows(1, 0, "eval")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def student_text(tokenizer, explanation):
    tail = FORMAT.student_tail(tokenizer, ROW["question"], ROW["solution"])
    return FORMAT.student_head_text(tokenizer, ROW["question"]) + explanation + tail.text


@pytest.mark.parametrize("explanation", ["1+0=1;", "Zürich – 東京\n\n\n \tx  y", "system\nuser<|x|>", "🙂" * 3])
def test_encoding_and_decoding_give_the_text_back(tokenizer, explanation):
    text = student_text(tokenizer, explanation)
    assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize(
    "text",
    [*FORMAT.tags.all_tags, FORMAT.teacher_system_prompt, FORMAT.student_system_prompt]
    + ["system\n", "user\n", "assistant\n", "\n\n", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
)
def test_fixed_pieces_of_the_prompts_are_one_token_each(tokenizer, text):
    assert len(encode(tokenizer, text)) == 1


def test_tags_survive_decoding_without_special_tokens_and_chat_marks_do_not(tokenizer):
    ids = encode(tokenizer, student_text(tokenizer, "1+0=1;"))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert FORMAT.tags.thought.wrap("\n\n1+0=1;") in text
    assert FORMAT.tags.solution.wrap(ROW["solution"]) in text
    assert "<|im_" not in text


def test_a_piece_encodes_to_the_same_tokens_alone_and_in_its_text(tokenizer):
    pieces = [
        FORMAT.teacher_prompt_text(tokenizer, ROW["question"], ROW["solution"]),
        FORMAT.teacher_completion_text(tokenizer, ROW["question"], ROW["reasoning_trace"]),
    ]
    assert encode(tokenizer, "".join(pieces)) == [i for piece in pieces for i in encode(tokenizer, piece)]


def test_the_saved_tokenizer_is_the_built_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = student_text(tokenizer, ROW["reasoning_trace"])
    assert encode(loaded, text) == encode(tokenizer, text)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "1+1"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith("assistant\n")


def write_pid(folder):
    (folder / "config.json").write_text(str(os.getpid()))


def test_the_model_is_made_once_and_only_its_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "build_tiny_model", write_pid)
    folder = tiny.ensure_tiny_model(tmp_path / "cache")
    assert folder.stat().st_mode & stat.S_IROTH
    monkeypatch.setattr(tiny, "build_tiny_model", lambda folder: pytest.fail("made again"))
    assert tiny.ensure_tiny_model(tmp_path / "cache") == folder
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_an_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(folder):
        write_pid(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "build_tiny_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.ensure_tiny_model(tmp_path)
    assert not list(tmp_path.iterdir())


def ensure_beside_another(cache_dir, barrier):
    def build(folder):
        write_pid(folder)
        barrier.wait(timeout=60)  # both processes are now past the look into the cache

    tiny.build_tiny_model = build
    assert (tiny.ensure_tiny_model(cache_dir) / "config.json").is_file()


def test_two_processes_at_once_get_one_whole_model(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=ensure_beside_another, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [tiny.MODEL_FOLDER]
    assert int((tmp_path / tiny.MODEL_FOLDER / "config.json").read_text()) in [process.pid for process in processes]


def test_a_failing_disk_is_reported_and_not_taken_for_another_process(tmp_path, monkeypatch):
    def full_disk(folder):
        raise OSError("no space left")

    monkeypatch.setattr(tiny, "build_tiny_model", full_disk)
    with pytest.raises(OSError, match="no space left"):
        tiny.ensure_tiny_model(tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RLT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/rlt"),
        ({"HOME": "/home/x"}, "/home/x/.cache/rlt"),
    ],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, environment, expected):
    for name in ("RLT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(tiny.default_cache_dir()) == expected


def test_a_model_that_cannot_pass_its_gate_is_an_error_and_torch_keeps_its_random_state(tmp_path, monkeypatch):
    for name in ("_NUM_FACTS_STEPS", "_NUM_HONEST_STEPS", "_MAX_ROUNDS"):
        monkeypatch.setattr(tiny, name, 1)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="student accuracy 0"):
        tiny.build_tiny_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_base_is_a_good_student_and_a_careless_teacher(tmp_path):
    tiny.build_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = generate_rows(400, seed=77, split="eval")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert tiny.student_accuracy(model, tokenizer, rows) >= tiny.MIN_STUDENT_ACCURACY
    assert tiny.MIN_HONEST_FRAC <= tiny.teacher_honest_frac(model, tokenizer, rows) <= 0.4
