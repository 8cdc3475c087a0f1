"""The int8 activation-retention fix, on bitsandbytes' real autograd functions."""

import gc
import inspect
import weakref

import pytest
import torch
from bitsandbytes.autograd import _functions as bnb
from bitsandbytes.functional import int8_vectorwise_quant
from torch.utils.checkpoint import checkpoint

from optimization.bitsandbytes_patches import release_int8_activations

NUM_LINEARS, WIDTH, NUM_TOKENS = 6, 32, 16


@pytest.fixture
def original_forwards(monkeypatch):
    """bitsandbytes as its authors wrote it, and again as it was after the test."""
    for function_class in (bnb.MatMul8bitLt, bnb.MatMul8bitFp):
        forward = inspect.unwrap(function_class.forward)
        monkeypatch.setattr(function_class, "forward", staticmethod(forward))


def int8_states(threshold):
    torch.manual_seed(0)
    states = []
    for _ in range(NUM_LINEARS):
        state = bnb.MatmulLtState()
        state.CB, state.SCB, _ = int8_vectorwise_quant(torch.randn(WIDTH, WIDTH, dtype=torch.float16))
        state.threshold, state.has_fp16_weights, state.is_training = threshold, False, True
        states.append(state)
    return states


def forward_and_backward(function_class, threshold):
    """Inputs of the int8 linears that are alive after a checkpointed forward, and the gradient of the first input."""
    inputs = []

    def block(hidden, state):
        hidden = torch.tanh(hidden)
        inputs.append(weakref.ref(hidden))
        return function_class.apply(hidden, state.CB, None, None, state)

    first = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    first[:, 3] *= 20  # an outlier column, so that threshold 6 takes the mixed path
    hidden = first.requires_grad_()
    for state in int8_states(threshold):
        hidden = checkpoint(block, hidden * 8, state, use_reentrant=False)
    gc.collect()
    num_alive = sum(ref() is not None for ref in inputs)
    hidden.square().sum().backward()
    return num_alive, first.grad


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("class_name", ["MatMul8bitLt", "MatMul8bitFp"])
def test_checkpointing_frees_int8_inputs_and_gradients_stay_bit_equal(original_forwards, class_name, threshold):
    function_class = getattr(bnb, class_name)
    alive_before, grad_before = forward_and_backward(function_class, threshold)
    release_int8_activations()
    alive_after, grad_after = forward_and_backward(function_class, threshold)
    assert (alive_before, alive_after) == (NUM_LINEARS, 0)
    assert grad_before.abs().sum() > 0
    assert torch.equal(grad_before, grad_after)


def test_releasing_twice_wraps_once(original_forwards):
    release_int8_activations()
    once = bnb.MatMul8bitLt.forward
    release_int8_activations()
    assert bnb.MatMul8bitLt.forward is once


def test_a_weight_that_needs_a_gradient_keeps_its_input(original_forwards):
    release_int8_activations()

    def weight_gradient(function_class, hidden, weight):
        state = bnb.MatmulLtState()
        state.has_fp16_weights, state.is_training = True, True
        function_class.apply(hidden, weight, None, None, state).sum().backward()
        return weight.grad

    torch.manual_seed(2)
    hidden = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float16)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float16, requires_grad=True)
    gradient = weight_gradient(bnb.MatMul8bitFp, hidden, weight)
    torch.testing.assert_close(gradient, hidden.sum(0).expand(WIDTH, WIDTH).to(gradient.dtype), rtol=2e-2, atol=2e-2)


def test_bitsandbytes_still_keeps_the_input_where_the_fix_drops_it():
    """If this fails, bitsandbytes changed: look whether the fix is still needed and still right."""
    assert "ctx.tensors = (CAt, subA, A)" in inspect.getsource(inspect.unwrap(bnb.MatMul8bitLt.forward))
    assert "CAt, subA, _A = ctx.tensors" in inspect.getsource(bnb.MatMul8bitLt.backward)
    assert "ctx.A = A" in inspect.getsource(inspect.unwrap(bnb.MatMul8bitFp.forward))
