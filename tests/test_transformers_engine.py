"""Sampling with the trainer's own model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from core.errors import NonFiniteError
from generation.base import SamplingSettings
from generation.transformers_engine import TransformersGenerator
from tests.helpers.planted_outliers import write_planted_model

PROMPTS = [[5, 6, 7, 8, 9], [20, 21]]
SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=12, stop_token_ids=(1, 2, 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=1.0)


@pytest.fixture
def teacher(checkpoint):
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def engine(model, rows_per_call=12, **changes):
    settings = SamplingSettings(**{f: getattr(SETTINGS, f) for f in SETTINGS.__slots__} | changes)
    return TransformersGenerator(model, settings, rows_per_call)


def plain_logprobs(model, prompt, completion, temperature):
    """Ten lines without cache, padding or batch."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = (logits / temperature).log_softmax(-1)
    return [logprobs[position, token].item() for position, token in enumerate(completion)]


def test_logprobs_are_those_of_an_uncached_unpadded_forward_at_the_sampling_temperature(teacher):
    completions = engine(teacher).generate(PROMPTS, 3, range(6))
    for row, completion in enumerate(completions):
        expected = plain_logprobs(teacher, PROMPTS[row // 3], completion.token_ids, SETTINGS.temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_row_depends_on_its_prompt_and_seed_and_not_on_the_rest_of_the_batch(teacher):
    seeds = [11, 12, 13, 14, 15, 16]
    together = engine(teacher).generate(PROMPTS, 3, seeds)
    alone = engine(teacher).generate([PROMPTS[1]], 1, [15])
    one_prompt_a_call = engine(teacher, rows_per_call=1).generate(PROMPTS, 3, seeds)
    assert together[4].token_ids == alone[0].token_ids
    assert [c.token_ids for c in together] == [c.token_ids for c in one_prompt_a_call]
    assert len({tuple(c.token_ids) for c in together}) > 3


def test_a_row_ends_with_the_first_stop_token_or_at_the_length_limit(teacher):
    completions = engine(teacher, stop_token_ids=tuple(range(0, 128, 8))).generate(PROMPTS, 16, range(32))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        stops = [token for token in completion.token_ids if token % 8 == 0]
        if completion.finish_reason == "stop":
            assert stops == completion.token_ids[-1:]
        else:
            assert not stops
            assert len(completion.token_ids) == SETTINGS.max_new_tokens
        assert len(completion.logprobs) == len(completion.token_ids)


def test_tokens_are_drawn_with_the_models_probabilities(teacher):
    num_rows, temperature = 4000, 0.7
    completions = engine(teacher, max_new_tokens=1).generate(PROMPTS[:1], num_rows, range(num_rows))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=128)
    with torch.no_grad():
        expected = (teacher(torch.tensor(PROMPTS[:1])).logits[0, -1] / temperature).softmax(-1)
    standard_errors = (expected * (1 - expected) / num_rows).sqrt()
    assert ((counts / num_rows - expected).abs() < 5 * standard_errors + 1e-3).all()


def test_top_k_top_p_and_min_p_sample_from_the_renormalised_kept_tokens(teacher):
    with torch.no_grad():
        logits = teacher(torch.tensor(PROMPTS[:1])).logits[0, -1]
    best = logits.topk(3)
    completions = engine(teacher, max_new_tokens=1, temperature=1.0, top_k=3).generate(PROMPTS[:1], 64, range(64))
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True))
    assert {c.token_ids[0] for c in completions} == set(expected)
    assert all(c.logprobs[0] == pytest.approx(expected[c.token_ids[0]], abs=1e-4) for c in completions)
    for greedy in ({"top_p": 1e-6}, {"min_p": 1.0}):
        completions = engine(teacher, max_new_tokens=1, **greedy).generate(PROMPTS[:1], 4, range(4))
        assert {(c.token_ids[0], c.logprobs[0]) for c in completions} == {(best.indices[0].item(), 0.0)}


def test_global_random_state_training_mode_and_checkpointing_are_as_before(teacher):
    teacher.gradient_checkpointing_enable()
    teacher.train()
    teacher.base_model.model.model.layers[0].eval()  # a part that somebody froze on purpose
    modes, random_state = [m.training for m in teacher.modules()], torch.get_rng_state()
    while_training = engine(teacher).generate(PROMPTS, 2, range(4))
    assert [m.training for m in teacher.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    teacher.gradient_checkpointing_disable()
    assert engine(teacher.eval()).generate(PROMPTS, 2, range(4)) == while_training


def test_the_current_adapter_is_sampled_without_a_swap(teacher):
    generator = engine(teacher)
    before = generator.logprobs([PROMPTS[0]])
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    generator.sync_adapter(teacher)
    after = generator.logprobs([PROMPTS[0]])
    assert abs(after[0][0] - before[0][0]) > 1e-3
    assert after[0] == pytest.approx(plain_logprobs(teacher, PROMPTS[0][:1], PROMPTS[0][1:], 1.0), abs=1e-4)


def test_progress_is_reported_up_to_the_last_row(teacher):
    reports = []
    engine(teacher, rows_per_call=1).generate(PROMPTS, 2, range(4), lambda done, total: reports.append((done, total)))
    assert reports == [(2, 4), (4, 4)]


def test_a_seed_is_needed_for_every_row(teacher):
    with pytest.raises(ValueError, match="3 seeds for 2 prompts x 2 = 4 rows"):
        engine(teacher).generate(PROMPTS, 2, [1, 2, 3])


def test_a_model_that_overflows_stops_the_run(teacher):
    with torch.no_grad():
        teacher.base_model.model.lm_head.weight[:] = float("nan")
    with pytest.raises(NonFiniteError):
        engine(teacher).generate(PROMPTS, 1, range(2))
