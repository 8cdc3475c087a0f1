"""16-bit product of int8 weights against LLM.int8: seconds of a scoring forward and of a training step, and the plan.

On this machine's GPU with layers of a 7B, else on its CPU with small ones; both ways interleaved, the fastest of a few
passes. On a CPU LLM.int8 is taken as a run there has it (`models.evaluation.evaluation_mode`).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from core.log import console
from core.units import gb
from models.evaluation import evaluation_mode
from optimization.bitsandbytes_patches import release_int8_activations
from optimization.gpu import find_card, pick_device
from optimization.int8_matmul import multiply_in_16_bits
from planner.activations import score_activation_bytes, train_activation_bytes
from planner.teacher import teacher_settings
from schemas.compose import compose_run_config
from schemas.run import load_teacher_config

NUM_PASSES = 5


def make_teacher(device: torch.device) -> PeftModel:
    """Two blocks of a 7B's width, on a CPU four of a quarter of it, LLM.int8 with an adapter, checkpointed."""
    hidden, intermediate, layers = (3584, 18944, 2) if device.type == "cuda" else (896, 4736, 4)
    shape = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(shape).to(torch.bfloat16).requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    quantised = bnb.nn.Linear8bitLt(
                        linear.in_features, linear.out_features, linear.bias is not None, False, threshold=6.0
                    )
                    quantised.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False).to(device)
                    quantised.bias = linear.bias
                    setattr(parent, name, quantised)
    model.is_loaded_in_8bit = True
    teacher = get_peft_model(model.to(device), LoraConfig(r=16, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return teacher.train()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    release_int8_activations()
    device = pick_device("auto")
    teachers = {"llm_int8": make_teacher(device), "dequantize": make_teacher(device)}
    multiply_in_16_bits(teachers["dequantize"])
    token_ids = torch.randint(1024, (2, 4096 if device.type == "cuda" else 256), device=device)

    def score(teacher: PeftModel) -> None:
        with torch.no_grad(), evaluation_mode(teacher):
            teacher(input_ids=token_ids)

    def train(teacher: PeftModel) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = teacher(input_ids=token_ids, labels=token_ids).loss
        loss.backward()

    where = str(find_card() or f"CPU, {torch.get_num_threads()} threads")
    for what, work in (("scoring forward", score), ("training step", train)):
        best = dict.fromkeys(teachers, float("inf"))
        for _ in range(NUM_PASSES):
            for name, teacher in teachers.items():
                best[name] = min(best[name], seconds(lambda work=work, teacher=teacher: work(teacher), device))
        figures = ", ".join(f"{name} {value:.3f} s" for name, value in best.items())
        console.print(
            f"{what} of {token_ids.numel()} tokens ({where}): {figures}, "
            f"ratio {best['dequantize'] / best['llm_int8']:.2f}"
        )
    settings = teacher_settings(load_teacher_config(compose_run_config("teacher_rlt_mono_85gb")))
    for what, formula in (("scoring", score_activation_bytes), ("training", train_activation_bytes)):
        plain, widened = (formula(replace(settings, int8_matmul=product)) for product in ("llm_int8", "dequantize"))
        console.print(
            f"activations of {what}, teacher_rlt_mono_85gb: {gb(plain):.2f} GB by LLM.int8, {gb(widened):.2f} GB in "
            f"16 bits (predicted)"
        )


if __name__ == "__main__":
    main()
