"""The 16-bit product of int8 weights: right against float64, bit-equal to the plain linear, nearer the generator."""

import copy
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from peft import LoraConfig, get_peft_model
from torch import nn

from core.types import Role
from data.embedded.model import ensure_tiny_model
from models.evaluation import evaluation_mode
from models.host import ModelHost
from optimization.int8_matmul import DequantizedProduct, Int8LinearIn16Bits, multiply_in_16_bits
from rollout.types import ScoringRow
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.planted_outliers import VOCABULARY_SIZE, load_quantised, write_planted_model
from tests.helpers.tiny_run import write_random_model

TOKEN_IDS = torch.arange(2, 122).reshape(3, 40)
SHAPES = [((7, 64), 96), ((2, 5, 33), 17), ((1, 1, 128), 1), ((64, 48), 200)]


def random_linear(x_shape, num_out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(x_shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_out, x_shape[-1], generator=generator) * 0.05
    q, scb, _ = int8_vectorwise_quant(weight.half())
    bias = torch.randn(num_out, generator=generator).to(dtype)
    dy = torch.randn((*x_shape[:-1], num_out), generator=generator).to(dtype)
    return x, q, scb, bias, dy


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("x_shape", "num_out"), SHAPES)
def test_forward_and_input_gradient_are_those_of_float64(x_shape, num_out, dtype, error):
    x, q, scb, bias, dy = random_linear(x_shape, num_out, dtype)
    y = DequantizedProduct.apply(x, q, scb, bias)
    y.backward(dy)
    weight = q.double() * scb.double()[:, None] / 127
    exact, exact_dx = x.detach().double() @ weight.T + bias.double(), dy.double() @ weight
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert (y.double() - exact).norm() < error * exact.norm()
    assert (x.grad.double() - exact_dx).norm() < error * exact_dx.norm()


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_plain_dequantised_linear_and_keeps_q_and_scales_alone(seed):
    x_shape, num_out = SHAPES[seed % len(SHAPES)]
    x, q, scb, bias, dy = random_linear(x_shape, num_out, torch.bfloat16, seed)
    plain_x, kept = x.detach().clone().requires_grad_(), []
    weight = (q.float() * (scb * (1 / 127))[:, None]).bfloat16()
    plain = nn.functional.linear(plain_x, weight, bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        y = DequantizedProduct.apply(x, q, scb, bias)
    y.backward(dy)
    plain.backward(dy)
    assert torch.equal(y, plain) and torch.equal(x.grad, plain_x.grad)
    assert set(kept) == {q.data_ptr(), scb.data_ptr()}


def test_activations_beyond_float16_over_the_scale_stay_finite():
    """The product of unscaled int8 values would be 1e5 and more, which float16 does not hold."""
    x = torch.full((1, 512), 4.0, dtype=torch.float16)
    q, scb = torch.full((1, 512), 127, dtype=torch.int8), torch.tensor([0.1])
    assert DequantizedProduct.apply(x, q, scb, None).item() == pytest.approx(204.8, rel=1e-2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=60.0)


def teacher_of(checkpoint):
    torch.manual_seed(0)
    base = load_quantised(checkpoint, 8)
    multiply_in_16_bits(base)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def adapter_gradients(teacher):
    teacher.zero_grad()
    teacher.train()(TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    return [p.grad.clone() for p in teacher.parameters() if p.requires_grad]


def all_equal(left, right):
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_gradients_are_bit_equal_with_checkpointing_and_after_an_evaluation(checkpoint):
    teacher = teacher_of(checkpoint)
    plain = adapter_gradients(teacher)
    with evaluation_mode(teacher), torch.no_grad():
        teacher(TOKEN_IDS)
    assert all_equal(adapter_gradients(teacher), plain)
    teacher.gradient_checkpointing_enable({"use_reentrant": False})
    teacher.enable_input_require_grads()
    assert all_equal(adapter_gradients(teacher), plain)


def test_on_a_cpu_it_is_what_bitsandbytes_trains_with_and_undo_gives_its_own_back(checkpoint):
    model = load_quantised(checkpoint, 8)
    with torch.no_grad():
        scored_by_bitsandbytes, trained_by_bitsandbytes = model(TOKEN_IDS).logits, model.train()(TOKEN_IDS).logits
        record = multiply_in_16_bits(model.eval())
        assert torch.equal(model(TOKEN_IDS).logits, trained_by_bitsandbytes)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(TOKEN_IDS).logits, trained_by_bitsandbytes)
        record.undo()
        assert torch.equal(model(TOKEN_IDS).logits, scored_by_bitsandbytes)
    assert str(record) == "16-bit product: product of 21 int8 linears: llm_int8 -> dequantize"
    assert multiply_in_16_bits(load_quantised(checkpoint, 16)).skipped == "Qwen2ForCausalLM has no LLM.int8 linear"


class KernelsProduct(nn.Module):
    """A linear as a weight-only kernel of the generator computes it: sums and scale in float32, rounded once."""

    def __init__(self, linear):
        super().__init__()
        linear.init_8bit_state()
        self.linear = linear

    def forward(self, x):
        q, scale, bias = self.linear.weight.data.float(), self.linear.state.SCB / 127, self.linear.bias
        return ((x.float() @ q.T) * scale + (0 if bias is None else bias.float())).to(x.dtype)


def generator_of(checkpoint):
    model = load_quantised(checkpoint, 8)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear8bitLt):
            model.set_submodule(name, KernelsProduct(module))
    return model


@torch.no_grad()
def logprobs(model, token_ids):
    logprobs = model(token_ids).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, token_ids[:, 1:, None])


@pytest.mark.parametrize("which", ["planted", pytest.param("embedded", marks=pytest.mark.slow)])
def test_the_gap_to_the_generator_is_smaller_than_that_of_llm_int8(which, checkpoint):
    """Mean |log p(trainer) - log p(generator)|; LLM.int8 as a GPU computes it, which a CPU does in evaluation mode."""
    folder = checkpoint if which == "planted" else ensure_tiny_model()
    num_tokens = VOCABULARY_SIZE if which == "planted" else 30
    token_ids = torch.randint(2, num_tokens, (6, 40), generator=torch.Generator().manual_seed(0))
    model = load_quantised(folder, 8)
    sampled, llm_int8 = logprobs(generator_of(folder), token_ids), logprobs(model, token_ids)
    multiply_in_16_bits(model)
    gaps = [(scored - sampled).abs().mean().item() for scored in (llm_int8, logprobs(model, token_ids))]
    print(f"{which}: {gaps[0]:.4f} nats by LLM.int8, {gaps[1]:.4f} in 16 bits, ratio {gaps[1] / gaps[0]:.2f}")
    assert gaps[1] < 0.85 * gaps[0]


def test_the_setting_reaches_every_role(tmp_path):
    rows = [ScoringRow(token_ids=[5, 6, 7, 8, 9], spans=((2, 5),))]
    folder = write_random_model(tmp_path / "model")
    words = ["reference_model=separate", f"model_name_or_path={folder}", f"student_model={folder}"]
    config = load_run_config(compose_run_config("teacher_rlt_tiny", words))
    scored = {}
    for product, kind in (("dequantize", Int8LinearIn16Bits), ("llm_int8", bnb.nn.Linear8bitLt)):
        args = replace(config.model_args, int8_matmul=product)
        with ModelHost(replace(config, model_args=args), roles=list(Role), max_score_tokens=64) as host:
            for model in (host.teacher, host.student, host.reference):
                kinds = {type(module) for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)}
                assert kinds == {kind}
            scored[product] = host.score(Role.STUDENT, rows, 1.0)[0][0]
    assert torch.equal(*scored.values())  # on a CPU bitsandbytes trains and scores in 16 bits as well
