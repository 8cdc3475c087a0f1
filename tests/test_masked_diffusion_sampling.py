"""Sampling: what is fixed stays fixed, the surest tokens come first, equal seeds give equal texts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from generation.masked_diffusion import generate_responses, tokens_per_step
from schemas.llada import DiffusionSamplingConfig
from tests.helpers.tiny_diffusion import MASK, random_model

SETTINGS = DiffusionSamplingConfig(max_response_length=8, sampling_steps=4, block_length=4, sampling_temperature=1.0)
PROMPTS = [[1, 2, 3], [4, 5], [6]]


def sample(model, settings=SETTINGS, prompts=PROMPTS, seed=0, max_rows=3):
    return generate_responses(
        model, prompts, settings, mask_token_id=MASK, filler_token_id=0, max_rows=max_rows, seed=seed
    )


class Recorder:
    """A model whose inputs are kept."""

    def __init__(self, model):
        self.model, self.inputs = model, []

    def parameters(self):
        return self.model.parameters()

    def __call__(self, input_ids, **kwargs):
        self.inputs.append(input_ids.clone())
        return self.model(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_neither_a_prompt_nor_a_token_that_was_kept_ever_changes(remasking):
    recorder = Recorder(random_model())
    responses = sample(recorder, replace(SETTINGS, remasking=remasking))
    for b, prompt in enumerate(PROMPTS):
        assert all(ids_BT[b, :3].tolist() == [0] * (3 - len(prompt)) + prompt for ids_BT in recorder.inputs)
    for before_BT, after_BT in zip(recorder.inputs, recorder.inputs[1:], strict=False):
        kept_BT = before_BT != MASK
        assert torch.equal(before_BT[kept_BT], after_BT[kept_BT])
    assert not any(MASK in response for response in responses)


def test_blocks_are_finished_from_left_to_right_in_the_number_of_steps():
    recorder = Recorder(random_model())
    sample(recorder)
    num_masked = [
        [int((ids_BT[0, 3 + 4 * block :][:4] == MASK).sum()) for block in (0, 1)] for ids_BT in recorder.inputs
    ]
    assert num_masked == [[4, 4], [2, 4], [0, 4], [0, 2]]


def test_the_surest_token_is_kept_first():
    sure_at = 5

    class Model(torch.nn.Linear):
        def forward(self, input_ids, at_BT, **_):
            logits_BTV = torch.zeros(*input_ids.shape, MASK + 1)
            logits_BTV[..., 7] = 1.0
            logits_BTV[:, sure_at, 7] = 3.0
            return SimpleNamespace(logits=logits_BTV[at_BT])

    recorder = Recorder(Model(1, 1))
    settings = DiffusionSamplingConfig(max_response_length=4, sampling_steps=4, block_length=4)
    assert sample(recorder, settings, prompts=[[1, 2, 3]]) == [[7, 7, 7, 7]]
    assert recorder.inputs[1][0].tolist() == [1, 2, 3, MASK, MASK, 7, MASK]


def test_equal_seeds_give_equal_texts_and_others_do_not():
    model = random_model()
    assert sample(model, seed=1) == sample(model, seed=1)
    assert sample(model, seed=1) != sample(model, seed=2)


def test_padding_and_batching_do_not_change_the_likeliest_text():
    model, greedy = random_model(), replace(SETTINGS, sampling_temperature=0.0)
    alone = [sample(model, greedy, prompts=[prompt])[0] for prompt in PROMPTS]
    assert sample(model, greedy) == alone == sample(model, greedy, max_rows=2)


def test_guidance_is_the_difference_to_the_logits_without_the_prompt():
    model = random_model()
    one_token = DiffusionSamplingConfig(max_response_length=1, sampling_steps=1, block_length=1, guidance_scale=2.0)
    with torch.no_grad():
        conditional_V = model(torch.tensor([[1, 2, 3, MASK]])).logits[0, -1]
        unconditional_V = model(torch.tensor([[MASK, MASK, MASK, MASK]])).logits[0, -1]
    guided_V = 3 * conditional_V - 2 * unconditional_V
    guided_V[MASK] = -torch.inf
    assert sample(model, one_token, prompts=[[1, 2, 3]]) == [[int(guided_V.argmax())]]


def test_every_token_is_written_however_steps_divide_a_block():
    for length, steps in [(8, 8), (8, 3), (7, 2), (5, 1)]:
        counts = tokens_per_step(length, steps)
        assert sum(counts) == length and len(counts) == steps and max(counts) - min(counts) <= 1
