"""The forward process, the training loss and the likelihood bound of masked diffusion (LLaDA, arXiv 2502.09992).

Letters: S samples of a batch, B rows, T tokens of a row, N masked positions of a batch, K maskings of one row,
V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LEVEL = 1e-3
"""Smallest masking probability: bounds the weight 1 / t."""
OUTSIDE = -1
"""Sample number of padding."""


@dataclass(frozen=True, slots=True)
class DiffusionBatch:
    """Rows of tokens as a model reads them. A row holds one sample, or several that are kept apart."""

    token_ids_BT: Tensor
    sample_ids_BT: Tensor
    """Number of the sample (0 .. S - 1 over the batch) that a token belongs to; `OUTSIDE` for padding."""
    learned_BT: Tensor
    """True where a token may be masked: the response, or in pre-training every token."""
    position_ids_BT: Tensor
    """Position within the sample."""

    @property
    def num_samples(self) -> int:
        return int(self.sample_ids_BT.max()) + 1

    def learned_lens_S(self) -> Tensor:
        """Tokens of each sample that may be masked."""
        return torch.bincount(self.sample_ids_BT[self.learned_BT], minlength=self.num_samples)


def random_stream(seed: int, *key: int) -> torch.Generator:
    """A random stream that is a function of the run's seed and `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *key]).generate_state(1)[0]))


def low_discrepancy_levels(num_samples: int, first: float, offset_frac: float = 0.0) -> Tensor:
    """[S] masking probabilities t_i = (u + (i + o) / S) mod 1, mapped to [MIN_LEVEL, 1).

    Evenly spread over the batch, and each one uniform over draws of u (`first`, in [0, 1)). `offset_frac` o = m / M
    spreads the M micro-batches of a step too.
    """
    levels_S = (first + (torch.arange(num_samples) + offset_frac) / num_samples) % 1
    return MIN_LEVEL + (1 - MIN_LEVEL) * levels_S


def mask_by_level(batch: DiffusionBatch, levels_S: Tensor, generator: torch.Generator) -> Tensor:
    """[B, T] True where a token is masked: each learned token alone, with the probability of its sample.

    Drawn on the CPU, so that every device masks the same tokens.
    """
    draws_BT = torch.rand(batch.token_ids_BT.shape, generator=generator).to(levels_S.device)
    return batch.learned_BT & (draws_BT < levels_S[batch.sample_ids_BT.clamp_min(0)])


def diffusion_loss(
    model: Any,
    batch: DiffusionBatch,
    levels_S: Tensor,
    masked_BT: Tensor,
    mask_token_id: int,
    *,
    mean_over: Literal["samples", "tokens"] = "samples",
) -> Tensor:
    """-1 / t * sum over masked tokens of log p(x_i | x_t), in nats per token that may be masked.

    t: the sample's masking probability. "samples": each sample's sum is divided by its tokens that may be masked, and
    samples count the same (instruction tuning, eq. 5 of the paper). "tokens": the batch's sum is divided by all tokens
    that may be masked; the paper's pre-training (eq. 3), whose sequences have one length, is both.

    In expectation an upper bound of the negative log-likelihood per token; ln V for a model that predicts uniformly.
    """
    weights_S = loss_weights(batch, levels_S, mean_over)
    return weighted_loss(model, batch, weights_S, masked_BT, mask_token_id)


def loss_weights(batch: DiffusionBatch, levels_S: Tensor, mean_over: Literal["samples", "tokens"]) -> Tensor:
    """[S] what the loss of each masked token of a sample counts in the batch's loss."""
    lens_S = batch.learned_lens_S()
    return 1.0 / (levels_S * (lens_S * batch.num_samples if mean_over == "samples" else lens_S.sum()))


def weighted_loss(
    model: Any, batch: DiffusionBatch, weights_S: Tensor, masked_BT: Tensor, mask_token_id: int
) -> Tensor:
    """The share of `diffusion_loss` that falls to some rows of a batch; `weights_S` are the whole batch's."""
    losses_N = -target_logprobs(model, batch, masked_BT, mask_token_id)
    return (losses_N * weights_S[batch.sample_ids_BT[masked_BT]]).sum()


def target_logprobs(model: Any, batch: DiffusionBatch, masked_BT: Tensor, mask_token_id: int) -> Tensor:
    """[N] log p of the token under each mask, given the others; only masked positions reach the head."""
    logits_NV = model(
        input_ids=batch.token_ids_BT.masked_fill(masked_BT, mask_token_id),
        attention_mask=attention_mask(batch.sample_ids_BT),
        position_ids=batch.position_ids_BT,
        at_BT=masked_BT,
    ).logits
    return -F.cross_entropy(logits_NV.float(), batch.token_ids_BT[masked_BT], reduction="none")


def attention_mask(sample_ids_BT: Tensor) -> Tensor | None:
    """Mask that keeps samples apart: None where each row is one sample, [B, T] (1: token) where padding follows it.

    Where samples are packed, boolean [B, 1, T, T]: tokens of one sample see each other and nothing else.
    """
    token_BT, first_BT = sample_ids_BT != OUTSIDE, sample_ids_BT == sample_ids_BT[:, :1]
    if bool(first_BT.all()):
        return None
    if bool((first_BT | ~token_BT).all()):
        return token_BT.long()
    return sample_ids_BT[:, None, :, None] == sample_ids_BT[:, None, None, :]


@torch.no_grad()
def likelihood_bound(
    model: Any,
    token_ids_T: Tensor,
    learned_T: Tensor,
    *,
    mask_token_id: int,
    num_maskings: int,
    max_rows: int,
    generator: torch.Generator,
) -> Tensor:
    """[K] unbiased estimates of a lower bound of log p(learned tokens | the others), in nats (eq. 6 of the paper).

    L * E over l in 1..L and over sets of exactly l of the L learned tokens of 1 / l * sum of log p(x_i | the rest). Its
    variance is far below that of independently masked tokens weighted by 1 / t. Runs `max_rows` maskings at once.
    """
    num_learned = int(learned_T.sum())
    nums_masked_K = torch.randint(1, num_learned + 1, (num_maskings,), generator=generator)
    ranks_KL = torch.rand(num_maskings, num_learned, generator=generator).argsort(dim=1).argsort(dim=1)
    masked_KT = torch.zeros(num_maskings, len(token_ids_T), dtype=torch.bool, device=token_ids_T.device)
    masked_KT[:, learned_T] = (ranks_KL < nums_masked_K[:, None]).to(token_ids_T.device)
    sums_K = []
    for masked_BT in masked_KT.split(max_rows):
        batch = _copies(token_ids_T, learned_T, len(masked_BT))
        logprobs_N = target_logprobs(model, batch, masked_BT, mask_token_id)
        row_N = masked_BT.nonzero()[:, 0]
        sums_K.append(logprobs_N.new_zeros(len(masked_BT)).index_add_(0, row_N, logprobs_N))
    return num_learned * torch.cat(sums_K).cpu() / nums_masked_K


def _copies(token_ids_T: Tensor, learned_T: Tensor, num_rows: int) -> DiffusionBatch:
    device, length = token_ids_T.device, len(token_ids_T)
    return DiffusionBatch(
        token_ids_BT=token_ids_T.expand(num_rows, -1),
        sample_ids_BT=torch.arange(num_rows, device=device)[:, None].expand(-1, length),
        learned_BT=learned_T.expand(num_rows, -1),
        position_ids_BT=torch.arange(length, device=device).expand(num_rows, -1),
    )
