"""Supervised fine-tuning: what is learned of a row, that rows of a forward stay apart, runs that repeat themselves."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from core.errors import UserError
from core.log import log
from core.types import Role
from data.formats import encode, render_chat
from data.supervised import prepare_supervised
from schemas.compose import compose_run_config
from schemas.run import ConfigError, load_run_config
from tests.helpers.golden import golden_format, golden_tokenizer
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.helpers.tiny_sft import make_sft_trainer, sft_values, write_rows
from tests.test_model_card import run_code_of

RUNS = {"teacher": "teacher_sft_tiny", "student": "student_sft_tiny"}
# float32 without dropout, so that layouts and micro-batches can be compared to 1e-6.
PLAIN = ("model_args.load_in_8bit=false", "model_args.torch_dtype=float32", "save_strategy=no", "eval_strategy=no")
AS_ONE = ("train_batch_size=12", "per_device_train_batch_size=12", "max_steps=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def prepared(role: str, rows: Path, *words: str, tokenizer: Any = None) -> Any:
    values = sft_values(RUNS[role], "tiny", rows.parent / "run", rows, ("num_eval_prompts=0", *words))
    return prepare_supervised(load_run_config(values), tokenizer or golden_tokenizer(), golden_format(), 0)[0]


# What is learned


@pytest.mark.parametrize("trace", ["think", "\nthink\n", "\n\nthink\n\n", "\n\n\nthink", "  \n think", "1+1", "$."])
@pytest.mark.parametrize("role", RUNS)
def test_all_of_the_completion_is_learned_and_nothing_of_the_prompt(role, trace, tmp_path):
    """With a tokenizer that fuses a tag's end with what follows, and traces that begin with newlines."""
    tokenizer, form = golden_tokenizer(), golden_format()
    (tmp_path / "rows").mkdir()
    file = write_rows(tmp_path / "rows" / "rows.jsonl", num_rows=1, question="1+1", reasoning_trace=trace)
    (row,) = prepared(role, file, "max_length=4096")
    prompt, learned = row["input_ids"][: row["prompt_len"]], row["input_ids"][row["prompt_len"] :]
    system = form.teacher_system_prompt if role == "teacher" else form.student_system_prompt
    head, end_of_turn = render_chat(tokenizer, system, "1+1")
    content = trace.removeprefix("\n\n")
    opening = {"teacher": "<|begin_of_explanation|>\n\n", "student": "<|begin_of_thought|>\n\n"}[role]
    if role == "teacher":
        head += "<|begin_of_solution|>=0<|end_of_solution|>\n\n" + opening
        expected = content + "<|end_of_explanation|>" + end_of_turn
    else:
        expected = opening + content + "<|end_of_thought|>\n\n<|begin_of_solution|>=0<|end_of_solution|>" + end_of_turn
    assert tokenizer.decode(prompt) == head and tokenizer.decode(learned) == expected
    assert prompt == encode(tokenizer, head), "the tokens that the prompt has in reinforcement learning"


def test_a_students_answer_has_the_tokens_that_the_reward_scores(rows):
    """Head with the opened thought, and what follows it, are tokenised apart there too."""
    tokenizer, form = golden_tokenizer(), golden_format()
    row = prepared("student", rows, "max_length=4096")[7]
    opened = encode(tokenizer, form.student_head_text(tokenizer, "7+7"))
    tail = encode(tokenizer, "abab7;" + form.student_tail(tokenizer, "7+7", "=14").text)
    assert row["input_ids"] == opened + tail


def test_of_several_rows_the_first_ones_are_learned(rows):
    every, first = prepared("student", rows), prepared("student", rows, "num_train_rows=3")
    assert first["input_ids"] == every["input_ids"][:3] and len(every) > 3
    assert len(prepared("student", rows, "num_train_rows=10000")) == len(every)


def test_rows_that_are_too_long_are_left_out_and_counted(rows, caplog, monkeypatch):
    whole = prepared("student", rows, "max_length=4096")
    lengths = sorted({len(row["input_ids"]) for row in whole})
    limit = lengths[len(lengths) // 2]
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=log.name):
        kept = prepared("student", rows, f"max_length={limit}")
    num_out = len(whole) - len(kept)
    assert num_out > 0 and max(len(row["input_ids"]) for row in kept) == limit
    (message,) = {record.getMessage() for record in caplog.records if "max_length" in record.getMessage()}
    assert f"{num_out} of 40 rows" in message and f"above {limit} in all" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("max_length=4",), "no row of .* fits max_length=4"),
        (("max_prompt_length=3",), "max_prompt_length=3"),
        (("data", "reasoning_trace"), "has no trace"),
    ],
)
def test_data_of_which_nothing_can_be_learned_is_refused(words, message, tmp_path):
    more = {"reasoning_trace": ""} if words[0] == "data" else {}
    file = write_rows(tmp_path / "rows.jsonl", **more)
    with pytest.raises(UserError, match=message):
        prepared("student", file, *(word for word in words if "=" in word))


# Loss and gradients


def plain_loss(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Each row alone: the mean negative log-likelihood of everything behind the prompts."""
    nats, num_tokens = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logprobs_TV = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        for place in range(row["prompt_len"], len(ids)):
            nats = nats - logprobs_TV[place - 1, ids[place]]
            num_tokens += 1
    return nats / num_tokens


def gradients(trainer: Any) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def step_of(trainer: Any, rows: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    loss = trainer.training_step(trainer.model, trainer.data_collator(rows))
    return loss.item(), gradients(trainer)


def assert_equal_steps(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("micro_batch", [1, 12])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix", "padded"])
@pytest.mark.parametrize("role", RUNS)
def test_a_step_has_loss_and_gradients_of_each_row_alone(role, layout, micro_batch, model, tmp_path):
    """Whatever shares a forward: no row sees another, no token counts twice. Three rows have one prompt."""
    file = write_rows(tmp_path / "rows.jsonl", num_rows=20)
    words = (*PLAIN, f"model_args.sequence_layout={layout}", *AS_ONE, f"per_device_train_batch_size={micro_batch}")
    trainer = make_sft_trainer(RUNS[role], model, tmp_path / "run", file, *words, "num_eval_prompts=0")
    rows = [trainer.train_dataset[i] for i in range(9)]
    prompt, prompt_len = rows[0]["input_ids"][: rows[0]["prompt_len"]], rows[0]["prompt_len"]
    for row in rows[1:4]:
        rows.append({"input_ids": prompt + row["input_ids"][row["prompt_len"] :], "prompt_len": prompt_len})
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():  # an adapter begins with B = 0, and A then has no gradient
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    ours = step_of(trainer, rows)
    trainer.model.zero_grad()
    loss = plain_loss(trainer.model, rows)
    loss.backward()
    assert_equal_steps(ours, (loss.item(), gradients(trainer)))


def test_tokens_of_the_prompt_move_no_weight_but_through_what_is_learned(model, tmp_path, rows):
    """Gradients vanish where nothing is learned with certainty: a prompt alone has no loss."""
    trainer = make_sft_trainer("student_sft_tiny", model, tmp_path / "run", rows, *PLAIN, *AS_ONE)
    (row,) = trainer.data_collator([trainer.train_dataset[0]])
    (start, end), *_ = row.spans
    assert (start, end) == (row.prefix_len + 1, len(row.token_ids))
    loss = trainer.training_step(trainer.model, [row])
    assert loss.item() == pytest.approx(plain_loss(trainer.model, [trainer.train_dataset[0]]).item(), abs=1e-5)


def test_a_step_that_ran_out_of_memory_is_the_same_step_with_less_at_once(model, tmp_path, rows, monkeypatch):
    trainer = make_sft_trainer("student_sft_tiny", model, tmp_path / "run", rows, *PLAIN, *AS_ONE)
    batch = [trainer.train_dataset[i] for i in range(12)]
    whole, figures = step_of(trainer, batch), {k: list(v) for k, v in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    original, calls = SFTTrainer.training_step, []

    def fails_once_halfway(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        loss = original(self, *args, **kwargs)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", fails_once_halfway)
    assert_equal_steps(step_of(trainer, batch), whole)
    assert len(calls) > 2
    for name in ("entropy", "mean_token_accuracy"):
        assert trainer._metrics["train"][name] == pytest.approx(figures[name], abs=1e-5)
    assert trainer._metrics["train"]["num_tokens"][0] == 2 * figures["num_tokens"][0]


def test_the_held_out_loss_is_the_mean_over_the_learned_tokens(model, tmp_path, rows):
    trainer = make_sft_trainer("student_sft_tiny", model, tmp_path / "run", rows, *PLAIN)
    with torch.no_grad():
        expected = plain_loss(trainer.model, list(trainer.eval_dataset)).item()
    assert len(trainer.eval_dataset) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


# Runs


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """A run of each kind, to its end: the teacher's adapter on an 8-bit base, every weight of the student with Muon."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_rows(folder / "rows.jsonl")
    trainers = {}
    for role, run in RUNS.items():
        trainers[role] = make_sft_trainer(run, model, folder / role, file)
        trainers[role].train()
        trainers[role].finish()
    return trainers


def test_an_adapter_is_trained_in_float32_on_a_base_that_stays(finished, model):
    trainer = finished["teacher"]
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert any(p.detach().abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    assert (Path(trainer.args.output_dir) / "adapter_model.safetensors").is_file()


def test_the_result_of_all_weights_is_a_model_folder(finished, model):
    folder = Path(finished["student"].args.output_dir)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert loaded.keys() == before.keys()
    assert any(not torch.equal(loaded[name], before[name]) for name in before)
    text = (folder / "README.md").read_text()
    assert "3 of 3 steps" in text and "Muon" in text and "held-out" in text and "None" not in text


@pytest.mark.parametrize("role", RUNS)
def test_the_code_of_the_card_runs_in_the_folder_of_the_result(role, finished, monkeypatch):
    trainer = finished[role]
    names = run_code_of(Path(trainer.args.output_dir), monkeypatch)
    row = trainer.train_dataset[0]
    assert names["prompt"] == trainer.processing_class.decode(row["input_ids"][: row["prompt_len"]])
    assert names["output"].shape[1] > row["prompt_len"]


@pytest.mark.parametrize("role", RUNS)
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights(role, finished, model, tmp_path):
    whole = finished[role]
    file = Path(whole.args.output_dir).parent / "rows.jsonl"
    resumed = make_sft_trainer(RUNS[role], model, tmp_path / "run", file)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    ours, theirs = ({n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


@pytest.mark.parametrize("role", RUNS)
def test_every_figure_of_a_step_is_logged(role, finished):
    lines = [line for line in finished[role].state.log_history if "loss" in line]
    wanted = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "tokens_per_s/train"}
    assert len(lines) == 3 and all(wanted <= line.keys() for line in lines)
    assert [line["num_tokens"] for line in lines] == sorted({line["num_tokens"] for line in lines})


def test_reinforcement_learning_starts_from_a_warm_up_and_keeps_it_as_reference(finished, model, tmp_path):
    folder = finished["teacher"].args.output_dir
    words = ("max_steps=1", f"model_args.adapter_path={folder}", "beta=0.04")
    trainer = make_trainer(model, tmp_path / "rl", *words)
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    parameters = dict(trainer.host.teacher.named_parameters())

    def of_adapter(adapter: str) -> dict[str, Tensor]:
        return {name: parameters[name.replace(".weight", f".{adapter}.weight")].detach().clone() for name in saved}

    for adapter in ("default", "ref"):
        assert all(torch.equal(of_adapter(adapter)[name], saved[name]) for name in saved)
    trainer.train()
    assert any(not torch.equal(of_adapter("default")[name], saved[name]) for name in saved)
    assert all(torch.equal(of_adapter("ref")[name], saved[name]) for name in saved)
    assert Role.REFERENCE in trainer.host.roles
    trainer.close()


@pytest.mark.parametrize(
    ("run", "override", "message"),
    [
        ("student_sft_tiny", "model_args.load_in_8bit=true", "whose weights take no gradient"),
        ("student_sft_tiny", "model_args.adapter_path=x", "without an adapter"),
        ("teacher_sft_tiny", "use_muon=true", "is for whole matrices"),
        ("teacher_sft_tiny", "max_length=null", "`max_length` is null"),
        ("teacher_sft_tiny", "max_length=0", "`max_length` is 0"),
        ("teacher_sft_tiny", "train_batch_size=33", "gradient accumulation must be whole"),
        ("teacher_sft_tiny", "packing=true", "Use model_args.sequence_layout"),
        ("teacher_sft_tiny", "truncation_mode=keep_end", "never cut"),
        ("teacher_sft_tiny", "num_generations=4", "is not a setting"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(run, override, message):
    with pytest.raises(ConfigError) as error:
        load_run_config(compose_run_config(run, [override]))
    assert message in str(error.value)
