"""The canary tells a generator that follows the trainer from one that does not, with rounding between the two."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Qwen2ForCausalLM

from core.errors import CanaryError, NonFiniteError
from generation.base import SamplingSettings
from generation.canary import Canary
from generation.transformers_engine import TransformersGenerator
from tests.helpers.planted_outliers import write_planted_model

PROBES = torch.randint(2, 128, (4, 33), generator=torch.Generator().manual_seed(5)).tolist()


class Bf16Copy(TransformersGenerator):
    """A generator with weights of its own, in bf16: as far from the float32 trainer as vLLM is from a bf16 one."""

    def __init__(self, trainer):
        settings = SamplingSettings(temperature=1.0, max_new_tokens=1, stop_token_ids=())
        super().__init__(copy.deepcopy(trainer).to(torch.bfloat16), settings, rows_per_call=4)

    def sync_adapter(self, model):
        set_peft_model_state_dict(self._model, get_peft_model_state_dict(model))

    def lose_adapter(self):
        for name, parameter in self._model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()


class Bench:
    """A trainer that learns to raise its log-probs of the probes' even tokens, a generator and the canary between."""

    def __init__(self, checkpoint, learning_rate, tolerance=0.15):
        torch.manual_seed(3)
        base = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.trainer = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        self.generator = Bf16Copy(self.trainer)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.trainer.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
        )
        self.canary = Canary(self.generator, self.trainer_logprobs, PROBES, tolerance)

    def trainer_logprobs(self, rows, adapter_on):
        scorer = TransformersGenerator(self.trainer, self.generator.sampling, rows_per_call=4)
        if adapter_on:
            return scorer.logprobs(rows)
        with self.trainer.disable_adapter():
            return scorer.logprobs(rows)

    def step(self):
        """One optimizer step on rows that are not the probes."""
        token_ids = torch.randint(2, 64, (8, 24))
        self.trainer(token_ids, labels=token_ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def swap(self):
        self.generator.sync_adapter(self.trainer)
        return self.canary.check()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=1.0)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-6, 2e-3])
def test_a_generator_that_follows_passes_every_check(checkpoint, learning_rate):
    bench = Bench(checkpoint, learning_rate)
    for _ in range(8):
        reading = bench.swap()
        assert 0 < reading.mean_abs_difference < 0.05
        bench.canary.check()  # a wake-up without a swap
        bench.step()


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_one_skipped_swap_after_one_optimizer_step_is_noticed(checkpoint, steps_before):
    bench = Bench(checkpoint, learning_rate=2e-3)
    bench.swap()
    for _ in range(steps_before):
        bench.step()
        bench.swap()
    bench.step()
    with pytest.raises(CanaryError, match="adapter"):
        bench.canary.check()


def test_a_stale_generator_is_noticed_although_it_is_far_within_the_tolerance(checkpoint):
    bench = Bench(checkpoint, learning_rate=2e-3)
    bench.swap()
    bench.step()
    distances = [
        abs(g - t)
        for g_row, t_row in zip(bench.generator.logprobs(PROBES), bench.trainer_logprobs(PROBES, True), strict=True)
        for g, t in zip(g_row, t_row, strict=True)
    ]
    assert sum(distances) / len(distances) < 0.15
    with pytest.raises(CanaryError):
        bench.canary.check()


def test_an_adapter_that_gets_lost_is_noticed_and_named(checkpoint):
    bench = Bench(checkpoint, learning_rate=2e-3)
    for _ in range(4):
        bench.swap()
        bench.step()
    bench.swap()
    bench.generator.lose_adapter()
    with pytest.raises(CanaryError, match="no adapter"):
        bench.canary.check()


def test_swaps_that_never_happen_are_noticed_even_where_one_step_is_too_small_to_tell(checkpoint):
    bench = Bench(checkpoint, learning_rate=3e-5)
    bench.swap()
    bench.step()
    bench.canary.check()  # one stale step passes: it hides in the rounding
    with pytest.raises(CanaryError):
        for _ in range(40):
            bench.step()
            bench.canary.check()


def test_other_weights_are_noticed_by_the_tolerance(checkpoint):
    bench = Bench(checkpoint, learning_rate=2e-3)
    bench.swap()
    with torch.no_grad():
        for layer in bench.generator._model.base_model.model.model.layers:
            layer.mlp.down_proj.base_layer.weight += 0.05 * torch.randn_like(layer.mlp.down_proj.base_layer.weight)
    with pytest.raises(CanaryError, match="no known state"):
        bench.canary.check()


def test_log_probs_that_are_not_numbers_do_not_pass(checkpoint):
    bench = Bench(checkpoint, learning_rate=2e-3)
    bench.generator._model.base_model.model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="the generator"):
        bench.canary.check()


def test_weights_that_are_not_finite_are_told_from_a_generator_that_was_left_behind(checkpoint):
    bench = Bench(checkpoint, learning_rate=0.0)
    bench.swap()
    next(p for p in bench.trainer.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="trainer"):
        bench.swap()
