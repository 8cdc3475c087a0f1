"""The bidirectional Llama: it looks both ways, survives saving, and reads the published checkpoints."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from core.errors import UserError
from models.llada import LladaModel, new_llada
from models.load import load_base
from planner.shapes import load_shape
from schemas.model import ModelArgs
from tests.helpers.tiny_diffusion import random_model

IDS_BT = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_later_token_changes_the_logits_of_an_earlier_position(attn_implementation):
    model = random_model(attn_implementation)
    assert model.config._attn_implementation == attn_implementation
    changed_BT = IDS_BT.clone()
    changed_BT[0, -1] = 9
    with torch.no_grad():
        difference = (model(IDS_BT).logits - model(changed_BT).logits)[0, 0].abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_padding_is_not_seen(attn_implementation):
    model = random_model(attn_implementation)
    padded_BT = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS_BT], dim=1)
    mask_BT = (torch.arange(9) >= 3).long()[None]
    with torch.no_grad():
        assert torch.allclose(model(padded_BT, attention_mask=mask_BT).logits[:, 3:], model(IDS_BT).logits, atol=1e-4)


@pytest.mark.parametrize("load", ["auto", "load_base"])
def test_saved_and_loaded_it_is_the_same_model(load, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    if load == "auto":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    else:
        loaded = load_base(str(tmp_path), ModelArgs(torch_dtype="float32"), torch.device("cpu")).eval()
    assert isinstance(loaded, LladaModel) and loaded.config.mask_token_id == model.config.mask_token_id
    with torch.no_grad():
        assert torch.equal(loaded(IDS_BT).logits, model(IDS_BT).logits)


def test_chosen_positions_are_those_of_the_whole():
    model = random_model()
    at_BT = torch.tensor([[True, False, False, True, False, True]])
    with torch.no_grad():
        assert torch.allclose(model(IDS_BT, at_BT=at_BT).logits, model(IDS_BT).logits[at_BT], atol=1e-6)


# The names of the published checkpoints, written down from GSAI-ML/LLaDA-8B-Base.
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}


def published_name(name: str) -> str:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"model.transformer.blocks.{block[1]}.{BLOCK_NAMES[block[2]]}.weight" if block else OUTER_NAMES[name]


def test_the_embedding_of_end_of_text_is_learned_although_it_also_pads(tmp_path):
    from schemas.llada import NewModelShape

    shape = NewModelShape(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    tokenizer = SimpleNamespace(mask_token_id=11, eos_token_id=10, pad_token_id=10)
    new = new_llada(shape, ModelArgs(torch_dtype="float32"), tokenizer)
    new.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"pad_token_id": 10}))  # as the published one has it
    for model in (new, LladaModel.from_pretrained(tmp_path)):
        model(torch.tensor([[10, 11]])).logits.sum().backward()
        row = model.get_input_embeddings().weight
        assert row[10].norm() > 0 and row.grad[10].norm() > 0


def test_a_checkpoint_in_the_published_layout_is_read_without_running_its_code(tmp_path):
    model = random_model()
    weights = {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "mlp_hidden_size": 64,
        "vocab_size": 12,
        "embedding_size": 12,
        "max_sequence_length": 64,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "weight_tying": False,
        "mask_token_id": 11,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_base(str(tmp_path), ModelArgs(torch_dtype="float32"), torch.device("cpu")).eval()
    assert isinstance(loaded, LladaModel) and loaded.config.mask_token_id == 11
    assert load_shape(str(tmp_path)).num_params == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(IDS_BT).logits, model(IDS_BT).logits)


def test_other_code_of_a_repository_is_refused_unless_trusted(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "my_diffusion", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}})
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        load_base(str(tmp_path), ModelArgs(), torch.device("cpu"))
