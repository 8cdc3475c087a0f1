"""The trainer of masked-diffusion models: runs, repeats itself, resumes, trains adapters on 8-bit bases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import UserError
from data.formats import PromptFormat
from data.masked_diffusion import pack, prepare_samples
from data.samples import Sample
from models.llada import LladaModel, new_llada
from schemas.compose import CONFIG_ROOT
from schemas.run import ConfigError, load_run_config
from tests.helpers.tiny_diffusion import diffusion_values, make_diffusion_trainer
from trainers.evaluation import stated_solution
from trainers.masked_diffusion_run import build_training_args, load_diffusion_model, load_diffusion_tokenizer

SMALL_BATCH = ("train_batch_size=8", "per_device_train_batch_size=4", "logging_steps=1", "eval_steps=3", "save_steps=1")


def counting_samples(num_samples: int = 32) -> list[Sample]:
    """`012` -> `345`, from any digit on: learned in a few steps."""
    return [Sample([(start + i) % 10 + 48 for i in range(6)], 3, solution="x") for start in range(num_samples)]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def saved_nano(tmp_path: Path) -> Path:
    config = load_run_config(diffusion_values(tmp_path / "unused"))
    tokenizer = load_diffusion_tokenizer(config)
    torch.manual_seed(0)
    new_llada(config.new_model, config.model_args, tokenizer).save_pretrained(tmp_path / "nano")
    tokenizer.save_pretrained(tmp_path / "nano")
    return tmp_path / "nano"


def test_equal_seeds_give_equal_losses_and_the_result_is_a_model_folder(tmp_path):
    trainers = [make_diffusion_trainer(tmp_path / name, counting_samples(), *SMALL_BATCH) for name in ("a", "b")]
    for trainer in trainers:
        trainer.train()
        trainer.finish()
    assert losses(trainers[0]) == losses(trainers[1]) and len(losses(trainers[0])) == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(loaded, LladaModel)
    expected = trainers[0].model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("muon", ["true", "false"])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights(muon, tmp_path):
    words = (*SMALL_BATCH, f"use_muon={muon}", "eval_strategy=no")
    whole = make_diffusion_trainer(tmp_path / "whole", counting_samples(), *words)
    whole.train()
    resumed = make_diffusion_trainer(tmp_path / "resumed", counting_samples(), *words)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_after_its_last_step_trains_none_more(tmp_path):
    words = (*SMALL_BATCH, "eval_strategy=no")
    whole = make_diffusion_trainer(tmp_path / "whole", counting_samples(), *words)
    whole.train()
    last = whole.state.global_step
    resumed = make_diffusion_trainer(tmp_path / "resumed", counting_samples(), *words)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{last}"))
    assert resumed.state.global_step == last
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("precision", ["load_in_8bit", pytest.param("load_in_4bit", marks=pytest.mark.slow)])
def test_an_adapter_on_a_quantised_base_learns_and_the_base_stays(precision, tmp_path):
    words = (
        f"model_name_or_path={saved_nano(tmp_path)}",
        "new_model=null",
        "trainable_weights=adapter",
        "use_muon=false",
        "learning_rate=0.01",
        "lr_scheduler_type=constant",
        "lr_scheduler_kwargs=null",
        f"model_args.{precision}=true",
        "model_args.torch_dtype=bfloat16",
        "max_steps=30",
        *SMALL_BATCH,
        "save_strategy=no",
        "eval_strategy=no",
    )
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *words)
    before = trainer.evaluate()["eval_nll_bound"]
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.train()
    assert trainer.evaluate()["eval_nll_bound"] < before - 0.4
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())


def test_a_causal_model_is_refused(tmp_path):
    from tests.helpers.tiny_run import write_random_model

    model = write_random_model(tmp_path / "causal")
    words = (f"model_name_or_path={model}", "new_model=null", "trainable_weights=adapter", "use_muon=false")
    config = load_run_config(diffusion_values(tmp_path / "run", *words))
    with pytest.raises(UserError, match="Qwen2ForCausalLM"):
        load_diffusion_model(config, torch.device("cpu"), load_diffusion_tokenizer(config))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("block_length=5", "not a multiple of `block_length`"),
        ("sampling_steps=33", "Use a multiple of 1 up to 32"),
        ("trainable_weights=adapter", "whose weights are random"),
        ("model_args.load_in_8bit=true", "whose weights take no gradient"),
        ("model_name_or_path=x", "set one of `model_name_or_path`"),
        ("tokenizer_name_or_path=null", "without a tokenizer"),
        ("train_batch_size=41", "gradient accumulation must be whole"),
        ("objective=pretrain response_multiple=4", "has none"),
        ("gradient_accumulation_steps=2", "follows from other settings"),
        ("num_generations=4", "is not a setting"),
        ("new_model.hidden_size=60", "even width"),
        ("model_args.attn_implementation=flash_attention_2", "keeps samples apart"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_run_config(diffusion_values(tmp_path, *override.split()))
    assert message in str(error.value)


def test_a_vocabulary_without_room_for_the_mask_is_refused(tmp_path):
    config = load_run_config(diffusion_values(tmp_path, "new_model.vocab_size=271"))
    with pytest.raises(UserError, match="a tokenizer of 272 tokens"):
        load_diffusion_tokenizer(config)


def test_samples_of_a_file_of_ones_own(tmp_path):
    rows = [{"question": f"{i}+1", "solution": f"={i + 1}", "reasoning_trace": "count;"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"dataset_id_or_path={tmp_path / 'rows.jsonl'}", "num_eval_prompts=2", "response_multiple=8")
    config = load_run_config(diffusion_values(tmp_path / "run", *words))
    tokenizer, tags = load_diffusion_tokenizer(config), PromptFormat.from_config(config)
    train, held_out = prepare_samples(config, tokenizer, tags, seed=0)
    assert (len(train), len(held_out)) == (8, 2)
    for sample in train + held_out:
        response_ids = sample.token_ids[sample.prompt_len :]
        assert len(response_ids) % 8 == 0 and response_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(response_ids)
        assert text.startswith("count;") and stated_solution(text, tags.tags) == sample.solution


def test_texts_are_cut_into_pieces_and_documents_are_not_split_between_training_and_evaluation(tmp_path):
    texts = [f"{letter * 50}" for letter in "abcdefghij"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = (f"dataset_id_or_path={tmp_path / 'texts.jsonl'}", "objective=pretrain", "num_eval_prompts=2")
    config = load_run_config(diffusion_values(tmp_path / "run", *words))
    tokenizer = load_diffusion_tokenizer(config)
    train, held_out = prepare_samples(config, tokenizer, PromptFormat.from_config(config), seed=0)
    assert [len(sample.token_ids) for sample in train] == [32, 19] * 8
    assert len(held_out) == 2 and not {s.token_ids[0] for s in held_out} & {s.token_ids[0] for s in train}


def test_a_dataset_too_small_to_hold_anything_out_trains_without_evaluation(tmp_path):
    config = load_run_config(diffusion_values(tmp_path, "eval_on_start=true", "num_eval_prompts=8"))
    args = build_training_args(config, use_cpu=True, num_held_out=0)
    assert args.eval_strategy == "no" and not args.eval_on_start
    assert build_training_args(config, use_cpu=True).eval_strategy == "steps"


def test_packed_rows_hold_every_sample_once_within_their_length():
    samples = [Sample([i] * (1 + i % 7), 0) for i in range(50)]
    rows = list(pack(samples, 16))
    assert [sample for row in rows for sample in row] == samples
    assert all(sum(len(sample.token_ids) for sample in row) <= 16 for row in rows)


def run_train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONFIG_ROOT.parent / "train.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def test_a_large_run_without_a_gpu_says_what_it_plans_for(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_train("--config-name=llada_sft", cwd=tmp_path)
    assert done.returncode == 2 and "no CUDA device" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_embedded_task_is_learned_from_scratch(seed, tmp_path):
    done = run_train("--config-name=llada_tiny", f"seed={seed}", "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_exact_match"]["before"] < 0.3
    assert summary["eval_exact_match"]["after"] >= 0.6
    assert (tmp_path / "run" / "report.html").exists()
