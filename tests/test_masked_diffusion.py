"""The loss and the likelihood bound of masked diffusion, and what keeps packed samples apart."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from data.samples import Sample
from models.masked_diffusion import (
    MIN_LEVEL,
    attention_mask,
    diffusion_loss,
    likelihood_bound,
    low_discrepancy_levels,
    mask_by_level,
    target_logprobs,
)
from tests.helpers.tiny_diffusion import MASK, batch_of, random_model


class UniformModel:
    def __call__(self, at_BT, **_):
        return SimpleNamespace(logits=torch.zeros(int(at_BT.sum()), MASK + 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_expected_loss_of_a_uniform_predictor_is_the_logarithm_of_the_vocabulary():
    batch = batch_of([Sample([1, 2, 3, 4, 5, 6], 2)], [Sample([3, 3, 3], 0)], [Sample([1, 2, 3, 4], 3)])
    losses = []
    for seed in range(4000):
        levels_S = low_discrepancy_levels(3, float(torch.rand((), generator=generator(seed))))
        masked_BT = mask_by_level(batch, levels_S, generator(seed + 10_000))
        losses.append(diffusion_loss(UniformModel(), batch, levels_S, masked_BT, MASK).item())
    spread = torch.tensor(losses).std().item() / math.sqrt(len(losses))
    assert sum(losses) / len(losses) == pytest.approx(math.log(MASK + 1), abs=4 * spread)
    assert spread < 0.1


def test_pre_training_counts_tokens_and_instruction_tuning_samples():
    """A heading of two tokens beside a text of six: both ways the expected loss of a uniform predictor is ln V."""
    batch = batch_of([Sample([1, 2], 0), Sample([1, 2, 3, 4, 5, 6], 0)])
    levels_S, masked_BT = torch.tensor([0.5, 0.5]), torch.ones(1, 8, dtype=torch.bool)
    masked_BT[0, 2:] = False
    losses = [
        diffusion_loss(UniformModel(), batch, levels_S, masked_BT, MASK, mean_over=mean_over).item()
        / math.log(MASK + 1)
        for mean_over in ("samples", "tokens")
    ]
    assert losses == pytest.approx([1 / 0.5 / 2, 1 / 0.5 * 2 / 8])


def test_likelihood_bound_is_unbiased_against_enumeration_on_three_tokens():
    """Vocabulary 0, 1, 2 and the mask 3; two fixed tokens, three masked ones: every subset, weighted by its chance."""
    model = random_model(vocab_size=4)
    token_ids_T, learned_T = torch.tensor([2, 0, 1, 1, 2]), torch.tensor([False, False, True, True, True])
    exact = 0.0
    for size in (1, 2, 3):
        subsets = list(itertools.combinations((2, 3, 4), size))
        for subset in subsets:
            masked_T = torch.zeros(5, dtype=torch.bool)
            masked_T[list(subset)] = True
            with torch.no_grad():
                logits_TV = model(token_ids_T.masked_fill(masked_T, 3)[None]).logits[0]
            logprobs = logits_TV.log_softmax(-1)[masked_T, token_ids_T[masked_T]].sum().item()
            exact += 3 * logprobs / size / len(subsets) / 3
    estimates_K = likelihood_bound(
        model, token_ids_T, learned_T, mask_token_id=3, num_maskings=6000, max_rows=1000, generator=generator()
    )
    spread = estimates_K.std().item() / math.sqrt(len(estimates_K))
    assert estimates_K.mean().item() == pytest.approx(exact, abs=4 * spread)
    assert spread < 0.05


def test_bound_of_a_uniform_predictor_is_exact_for_every_masking():
    estimates_K = likelihood_bound(
        UniformModel(),
        torch.arange(6),
        torch.arange(6) > 1,
        mask_token_id=MASK,
        num_maskings=7,
        max_rows=3,
        generator=generator(),
    )
    assert estimates_K == pytest.approx(torch.full((7,), -4 * math.log(MASK + 1)))


def test_masked_positions_alone_carry_gradient():
    model, batch = random_model(), batch_of([Sample([1, 2, 3, 4, 5, 6], 2)])
    masked_BT = torch.tensor([[False, False, True, False, True, False]])
    outputs = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[0], output)))
    logits_hidden = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: logits_hidden.append(output))
    logits_hidden_grad = []

    def keep(module, inputs, output):
        output.register_hook(logits_hidden_grad.append)

    model.model.norm.register_forward_hook(keep)
    diffusion_loss(model, batch, torch.tensor([0.5]), masked_BT, MASK).backward()
    assert outputs[0][1].shape == (2, MASK + 1)
    assert torch.equal(logits_hidden_grad[0].abs().sum(-1) > 0, masked_BT)


def test_the_loss_is_what_ten_plain_lines_compute():
    model = random_model()
    batch = batch_of([Sample([1, 2, 3, 4], 1), Sample([5, 6], 0)], [Sample([7, 8, 9], 2)])
    levels_S = torch.tensor([0.9, 0.6, 0.4])
    masked_BT = mask_by_level(batch, levels_S, generator(3)) | (torch.tensor([[0] * 6, [0, 0, 1, 0, 0, 0]]) == 1)
    samples = [([1, 2, 3, 4], masked_BT[0, :4]), ([5, 6], masked_BT[0, 4:]), ([7, 8, 9], masked_BT[1, :3])]
    plain = 0.0
    for (token_ids, masked_T), level, num_learned in zip(samples, (0.9, 0.6, 0.4), (3, 2, 1), strict=True):
        tokens_T = torch.tensor(token_ids)
        logprobs_TV = model(tokens_T.masked_fill(masked_T, MASK)[None]).logits[0].log_softmax(-1)
        for position in masked_T.nonzero()[:, 0].tolist():
            plain -= logprobs_TV[position, tokens_T[position]].item() / level / num_learned / 3
    assert diffusion_loss(model, batch, levels_S, masked_BT, MASK).item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packed_samples_are_computed_as_if_each_were_alone(attn_implementation):
    model = random_model(attn_implementation)
    samples = [Sample([1, 2, 3, 4], 1), Sample([5, 6, 7], 0), Sample([8, 9], 1)]
    packed, alone = batch_of(samples), [batch_of([sample]) for sample in samples]
    with torch.no_grad():
        together_N = target_logprobs(model, packed, packed.learned_BT, MASK)
        apart_N = torch.cat([target_logprobs(model, batch, batch.learned_BT, MASK) for batch in alone])
    assert together_N.tolist() == pytest.approx(apart_N.tolist(), abs=1e-5)


def test_rows_of_one_sample_need_no_attention_mask_and_padding_does():
    assert attention_mask(batch_of([Sample([1, 2], 0)], [Sample([3, 4], 1)]).sample_ids_BT) is None
    padded = batch_of([Sample([1, 2], 0)], [Sample([3], 0)]).sample_ids_BT
    assert attention_mask(padded).tolist() == [[1, 1], [1, 0]]  # the form that every attention kernel takes


def test_responses_are_filled_with_learned_end_tokens_and_texts_with_padding():
    rows = [Sample([1, 2, 3, 4], 1)], [Sample([5, 6], 1)]
    filled, padded = batch_of(*rows, fills_responses=True), batch_of(*rows)
    assert filled.token_ids_BT.tolist() == padded.token_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert filled.learned_lens_S().tolist() == [3, 3]
    assert padded.learned_lens_S().tolist() == [3, 1]


def test_tokens_behind_the_learned_ones_are_given_and_seen():
    batch = batch_of([Sample([1, 2, 3, MASK, MASK], 2, num_after=2), Sample([4, 5], 1)])
    assert batch.learned_BT.tolist() == [[False, False, True, False, False, False, True]]
    assert batch.sample_ids_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1]]


def test_levels_are_evenly_spread_over_a_step_and_its_micro_batches():
    levels = torch.cat([low_discrepancy_levels(4, 0.37, micro / 2) for micro in range(2)]).sort().values
    assert levels.diff().tolist() == pytest.approx([(1 - MIN_LEVEL) / 8] * 7, abs=1e-6)
    assert levels.min() >= MIN_LEVEL and levels.max() < 1


def test_only_learned_tokens_are_masked_and_the_draw_is_repeatable():
    batch = batch_of([Sample([1] * 50, 10)])
    level = torch.tensor([0.999])
    masked_BT = mask_by_level(batch, level, generator(1))
    assert not masked_BT[:, :10].any() and masked_BT[:, 10:].float().mean() > 0.9
    assert torch.equal(masked_BT, mask_by_level(batch, level, generator(1)))
