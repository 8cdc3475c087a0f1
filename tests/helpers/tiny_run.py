"""A run small enough for a test: the embedded configuration on a small random model, transformers engine."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from data.embedded.tokenizer import build_tokenizer
from preflight.hardware import check_hardware_and_plan, load_for_this_machine
from schemas.compose import compose_run_config
from trainers.build import build_trainer, check_before_loading
from trainers.teacher_grpo import TeacherGRPOTrainer

SMALL = (
    "generator=transformers",
    "train_batch_size=8",
    "per_device_train_batch_size=4",
    "num_generations=4",
    "max_completion_length=8",
    "num_eval_prompts=4",
    "canary_tolerance=0.5",
)


def write_random_model(
    folder: Path, seed: int = 0, *, initializer_range: float = 0.2, hidden: int = 64, num_layers: int = 2
) -> Path:
    """The embedded tokenizer and a small Qwen2 whose random weights make outputs depend on the input."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * (2 if hidden == 64 else 4),
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        initializer_range=initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(model: Path, output_dir: Path, *overrides: str) -> TeacherGRPOTrainer:
    """A trainer as `train.py` builds it."""
    return make_planned_trainer(model, output_dir, *SMALL, *overrides)


def make_planned_trainer(model: Path, output_dir: Path, *overrides: str) -> TeacherGRPOTrainer:
    """As `make_trainer`, of the embedded configuration's own size and generator."""
    words = [f"model_name_or_path={model}", f"student_model={model}", f"output_dir={output_dir}", *overrides]
    values = compose_run_config("teacher_rlt_tiny", words)
    config = load_for_this_machine(values)
    return build_trainer(check_before_loading(config, values, *check_hardware_and_plan(config)))
