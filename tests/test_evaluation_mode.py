"""Evaluation of a model that is being trained: same arithmetic, nothing left behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from models.evaluation import evaluation_mode
from tests.helpers.planted_outliers import load_quantised, write_planted_model

TOKEN_IDS = torch.arange(2, 60)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=1.0)


def teacher_of(checkpoint, bits):
    torch.manual_seed(0)
    return get_peft_model(load_quantised(checkpoint, bits), LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_computes_as_training_does(checkpoint, bits, was_training):
    teacher = teacher_of(checkpoint, bits).train(was_training)
    with evaluation_mode(teacher), torch.no_grad():
        evaluated = teacher(TOKEN_IDS).logits
    with torch.no_grad():
        assert torch.equal(evaluated, teacher.train()(TOKEN_IDS).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_after_an_evaluation_are_those_without_one(checkpoint, bits):
    """bitsandbytes' own evaluation mode re-packs 4-bit weights on some CPUs, and training then fails."""

    def gradients(evaluate_first):
        teacher = teacher_of(checkpoint, bits)
        if evaluate_first:
            with evaluation_mode(teacher), torch.no_grad():
                teacher(TOKEN_IDS)
        teacher.train()(TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
        return [p.grad for name, p in teacher.named_parameters() if "lora_B" in name]

    plain, after_evaluation = gradients(False), gradients(True)
    assert sum(g.abs().sum() for g in plain) > 0
    assert all(torch.equal(left, right) for left, right in zip(plain, after_evaluation, strict=True))


def test_dropout_is_off_inside_and_every_mode_is_as_before_outside():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)).eval())
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False, False]
