"""QLoRA through the same trainer: NF4 base, double quantisation, paged 8-bit AdamW, LoRA."""

import json
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch

from models.export import exported_tensors
from schemas.compose import CONFIG_ROOT, compose_run_config
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_tiny_run import assert_learned

ROOT = CONFIG_ROOT.parent
RUN = "teacher_rlt_tiny_qlora"
QLORA = ("model_args.load_in_8bit=false", "model_args.load_in_4bit=true", "optim=paged_adamw_8bit")


def test_the_run_is_the_default_run_in_four_bits():
    default, qlora = compose_run_config("teacher_rlt_tiny"), compose_run_config(RUN)
    changed = {key for key in qlora if qlora[key] != default.get(key)}
    assert changed == {"run_name", "output_dir", "model_args", "optim"}
    assert qlora["optim"] == "paged_adamw_8bit"


def test_base_is_nf4_and_frozen_while_the_adapter_learns_with_a_paged_optimizer(tmp_path):
    trainer = make_trainer(write_random_model(tmp_path / "model"), tmp_path / "run", *QLORA, "max_steps=2")
    linears = [m for m in trainer.model.get_base_model().modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 14  # seven in each of two layers; the head stays in 16 bits
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in linears)
    packed = [m.weight.data.clone() for m in linears]
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, bnb.optim.AdamW) and optimizer.is_paged and optimizer.args.optim_bits == 8
    assert all(torch.equal(before, m.weight.data) for before, m in zip(packed, linears, strict=True))
    assert adapter and all("lora_" in name for name in adapter)
    moved = [not torch.equal(adapter[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert any(moved)


def test_the_generator_gets_the_values_of_the_four_bit_base(tmp_path):
    trainer = make_trainer(write_random_model(tmp_path / "model"), tmp_path / "run", *QLORA)
    base = trainer.model.get_base_model()
    exported = dict(exported_tensors(base, "dequantized"))
    linear = base.model.layers[0].mlp.down_proj.base_layer
    levels = torch.tensor(bnb.functional.get_4bit_type("nf4", device="cpu"))
    indices = torch.stack([linear.weight.data.view(-1) >> 4, linear.weight.data.view(-1) & 15], dim=1).view(-1).long()
    state = linear.weight.quant_state
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = (levels[indices].view(-1, 64) * absmax[:, None]).view(state.shape).to(torch.bfloat16)
    assert torch.equal(exported["model.layers.0.mlp.down_proj.weight"], plain)


@pytest.mark.slow
def test_the_qlora_run_meets_the_learning_bars_of_the_default_run(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"--config-name={RUN}", "seed=5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_learned(json.loads((tmp_path / f"results/{RUN}/summary.json").read_text()))
