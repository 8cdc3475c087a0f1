"""One quantised base for trainer and generator: the trainer computes the same bits, and a lost view is noticed."""

import gc
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from core.types import Role
from models.evaluation import evaluation_mode
from models.host import ModelHost
from models.shared_base import CannotShareError, share_base
from optimization.bitsandbytes_patches import release_int8_activations
from schemas.model import ModelArgs, ModelConfig
from tests.helpers.planted_outliers import load_quantised, write_planted_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = torch.randint(2, 100, (4, 33), generator=torch.Generator().manual_seed(5))
KINDS = [("int8", False), ("int8", True), ("nf4", False), ("nf4", True)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Untied and tied, with biases, and rows of the vocabulary that vLLM pads."""
    return {
        tied: write_planted_model(
            tmp_path_factory.mktemp("model"), outlier_scale=60.0, tied=tied, bias_scale=0.3, num_rows=100
        )
        for tied in (False, True)
    }


def lora_teacher(checkpoint, kind, *, has_run=True):
    """A quantised base under an adapter that does something; `has_run`: bitsandbytes has moved its scales already."""
    release_int8_activations()
    base = load_quantised(checkpoint, 8 if kind == "int8" else 4, device=DEVICE).requires_grad_(False)
    torch.manual_seed(1)
    teacher = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    if has_run:
        logprobs(teacher)
    return teacher


def logprobs(teacher):
    with torch.no_grad(), evaluation_mode(teacher):
        return teacher(ROWS.to(DEVICE)).logits.float().log_softmax(-1)


def step(teacher):
    """Loss and gradients of one checkpointed training step."""
    teacher.train()
    teacher.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher.enable_input_require_grads()
    token_ids = ROWS.to(DEVICE)
    loss = teacher(input_ids=token_ids, labels=token_ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in teacher.named_parameters() if p.grad is not None}
    teacher.zero_grad()
    teacher.gradient_checkpointing_disable()
    return loss.detach(), gradients


def assert_same_step(left, right):
    assert torch.equal(left[0], right[0]) and left[1].keys() == right[1].keys()
    assert len(left[1]) > 2 * 7 and all(torch.equal(gradient, right[1][name]) for name, gradient in left[1].items())


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("has_run", [False, True])
def test_log_probs_loss_and_all_gradients_are_bit_equal_on_the_shared_base(checkpoints, kind, tied, has_run):
    teacher = lora_teacher(checkpoints[tied], kind, has_run=has_run)
    plain = lora_teacher(checkpoints[tied], kind)
    shared = share_base(teacher)
    assert torch.equal(logprobs(teacher), logprobs(plain))
    assert_same_step(step(teacher), step(plain))
    assert torch.equal(logprobs(teacher), logprobs(plain))
    shared.check()


@pytest.mark.parametrize("tied", [False, True])
def test_an_int8_base_is_fused_as_vllm_wants_it_and_nothing_lies_twice(checkpoints, tied):
    teacher = lora_teacher(checkpoints[tied], "int8")
    base = teacher.get_base_model()
    before = {name: p.detach().clone() for name, p in base.named_parameters() if "lora_" not in name}
    shared = share_base(teacher)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters() if "lora_" not in name)
    attention, layer = base.model.layers[1].self_attn, shared.layers["model.layers.1.self_attn.qkv_proj"]
    parts = [attention.q_proj.base_layer, attention.k_proj.base_layer, attention.v_proj.base_layer]
    assert {storage(part.weight) for part in parts} | {storage(part.state.CB) for part in parts} == {
        storage(layer.values)
    }
    assert torch.equal(layer.values, torch.cat([part.weight for part in parts]))
    assert torch.equal(layer.scb, torch.cat([part.state.SCB for part in parts]))
    assert set(shared.layers) == {
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    tables = {name: rows for name, (rows, _) in shared.tables.items()}
    assert {rows.shape for rows in tables.values()} == {(128, 128)}  # 100 rows, padded
    assert (storage(tables["lm_head"]) == storage(tables["model.embed_tokens"])) == tied
    linears = [m for m in base.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    num_tables = 1 if tied else 2
    assert shared.nbytes == sum(m.weight.nbytes + 4 * m.out_features for m in linears) + num_tables * 128 * 128 * 2


def test_a_4_bit_base_stays_as_it_is(checkpoints):
    teacher = lora_teacher(checkpoints[False], "nf4")
    linears = [m for m in teacher.modules() if isinstance(m, bnb.nn.Linear4bit)]
    before = [m.weight.data_ptr() for m in linears]
    shared = share_base(teacher)
    assert [m.weight.data_ptr() for m in linears] == before
    assert [len(layer.parts) for layer in shared.layers.values()] == [3, 1, 2, 1] * 3
    held = {storage(tensor) for layer in shared.layers.values() for tensor in layer.tensors}
    assert {storage(m.weight.quant_state.absmax) for m in linears} < held


BREAKS = {
    "weight": lambda linear: setattr(linear.weight, "data", linear.weight.data.clone()),
    "values of the state": lambda linear: setattr(linear.state, "CB", linear.state.CB.clone()),
    "scales of the state": lambda linear: setattr(linear.state, "SCB", linear.state.SCB.clone()),
}
BREAKS_NF4 = {
    "weight": BREAKS["weight"],
    "scales": lambda linear: setattr(linear.weight.quant_state, "absmax", linear.weight.quant_state.absmax.clone()),
    "offset": lambda linear: setattr(linear.weight.quant_state, "offset", linear.weight.quant_state.offset.clone()),
}


@pytest.mark.parametrize(
    ("kind", "broken"), [("int8", name) for name in BREAKS] + [("nf4", name) for name in BREAKS_NF4]
)
@pytest.mark.parametrize("linear", ["k_proj", "o_proj"])
def test_a_linear_that_reads_other_memory_is_noticed(checkpoints, kind, broken, linear):
    teacher = lora_teacher(checkpoints[False], kind)
    shared = share_base(teacher)
    logprobs(teacher)
    shared.check()
    (BREAKS if kind == "int8" else BREAKS_NF4)[broken](
        getattr(teacher.get_base_model().model.layers[2].self_attn, linear).base_layer
    )
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.self_attn\."):
        shared.check()


@pytest.mark.parametrize("table", ["model.embed_tokens", "lm_head"])
def test_a_table_that_reads_other_memory_is_noticed(checkpoints, table):
    teacher = lora_teacher(checkpoints[False], "int8")
    shared = share_base(teacher)
    weight = teacher.get_base_model().get_submodule(table).weight
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match=table):
        shared.check()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_that_a_generator_reads_refuses_to_move_to_be_cast_and_to_be_merged(checkpoints, kind):
    teacher = lora_teacher(checkpoints[False], kind)
    shared = share_base(teacher)
    shared.hold_in_place(teacher)
    before = logprobs(teacher)
    for module in (teacher, teacher.get_base_model()):
        for move in (lambda m: m._apply(lambda t: t.to("meta")), lambda m: m._apply(lambda t: t.clone())):
            with pytest.raises(RuntimeError, match="not moved or cast"):
                move(module)
        with pytest.raises(RuntimeError, match="not moved or cast"):
            torch.nn.Module.to(module, torch.float16)
    for merge in (teacher.merge_adapter, teacher.merge_and_unload):
        with pytest.raises(RuntimeError, match="merged"):
            merge()
    torch.nn.Module.to(teacher, DEVICE)  # where it is: nothing happens
    shared.check()
    assert torch.equal(logprobs(teacher), before)


def test_what_cannot_be_shared_is_said_and_left_as_it_was(checkpoints, tmp_path):
    def refused(model, message):
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        with pytest.raises(CannotShareError, match=message):
            share_base(model)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before

    refused(load_quantised(checkpoints[False], 16), "q_proj is not quantised")
    in_part = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj", "lm_head"])
    refused(AutoModelForCausalLM.from_pretrained(checkpoints[False], quantization_config=in_part), "down_proj is not")
    spilled = load_quantised(checkpoints[False], 8)
    norm = spilled.model.layers[2].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"))
    refused(spilled, r"layers\.2\.input_layernorm\.weight is on meta")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shape = MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, **heads)
    refused(AutoModelForCausalLM.from_config(shape), "vLLM multiplies experts in another way")


def test_the_host_shares_checks_and_frees_the_base(checkpoints):
    config = ModelConfig(
        model_name_or_path=str(checkpoints[False]), model_args=ModelArgs(load_in_8bit=True, lora_r=4, lora_alpha=8)
    )
    with ModelHost(config, roles=[Role.TEACHER], max_score_tokens=256) as host:
        fused = StorageWeakRef(host.share_base().layers["model.layers.0.mlp.gate_up_proj"].values.untyped_storage())
        teacher = host.teacher
        table = StorageWeakRef(teacher.get_input_embeddings().weight.untyped_storage())
        host.attach_engine(mock.Mock())
        host.check_shared_base()
        linear = host.teacher.get_base_model().model.layers[0].mlp.up_proj.base_layer
        linear.weight.data = linear.weight.data.clone()
        with pytest.raises(RuntimeError, match="gate_up_proj"):
            host.check_shared_base()
        assert not fused.expired()
        del linear
    gc.collect()
    assert fused.expired() and table.expired(), "the closed host's teacher, which is still held here, is to be empty"
    assert teacher.get_input_embeddings().weight.numel() == 0
