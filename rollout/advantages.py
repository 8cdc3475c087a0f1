"""Group advantages (GRPO) and the importance ratio between trainer and sampler, as TRL 1.16 computes them.

Letters: B = P * G rows (prompt-major), G completions per prompt, F reward functions, T tokens of one row.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_EPS = 1e-4
"""Added to a standard deviation before dividing by it."""


def group_advantages(
    rewards_BF: Tensor,
    weights_F: Tensor,
    num_generations: int,
    *,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
) -> tuple[Tensor, Tensor]:
    """`(r - mean_group(r)) / (std + 1e-4)`, with the standard deviation of the group, of the batch, or not at all.

    `normalize_then_sum` (GDPO) normalises each reward function within its group, adds them up by weight and normalises
    over the batch. A NaN means that a function gives no reward; a row that none rewards has the advantage 0 and does
    not count in the means of the others.

    Returns:
        [B] advantages, and the [B] standard deviation that each row was compared by (0: nothing to learn from).
    """
    is_unscored_B = rewards_BF.isnan().all(-1)
    if aggregation == "normalize_then_sum":
        grouped_PGF = rewards_BF.view(-1, num_generations, rewards_BF.shape[-1])
        centred_PGF = grouped_PGF - grouped_PGF.nanmean(1, keepdim=True)
        normalised_BF = (centred_PGF / (_nanstd(grouped_PGF, 1) + _EPS)).view_as(rewards_BF)
        total_B = _weighted_sum(normalised_BF, weights_F, is_unscored_B)
        std_B = _nanstd(total_B, 0).expand_as(total_B)
        advantages_B = (total_B - total_B.nanmean()) / (std_B + _EPS)
    else:
        total_B = _weighted_sum(rewards_BF, weights_F, is_unscored_B)
        grouped_PG = total_B.view(-1, num_generations)
        centred_B = (grouped_PG - grouped_PG.nanmean(1, keepdim=True)).flatten()
        if scale_rewards == "batch":
            std_B = _nanstd(total_B, 0).expand_as(total_B)
        else:
            std_B = _nanstd(grouped_PG, 1).expand_as(grouped_PG).flatten()
        advantages_B = centred_B if scale_rewards == "none" else centred_B / (std_B + _EPS)
    return advantages_B.nan_to_num(nan=0.0), std_B


def _weighted_sum(values_BF: Tensor, weights_F: Tensor, is_unscored_B: Tensor) -> Tensor:
    return (values_BF * weights_F).nansum(-1).masked_fill(is_unscored_B, torch.nan)


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Sample standard deviation of what is not NaN, the dimension kept where there are others."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    variance = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True) / (count - 1).clamp(
        min=1
    )
    return variance.sqrt() if values.dim() > 1 else variance.sqrt().squeeze(0)


def importance_ratios(
    trainer_logprobs: Sequence[Tensor],
    sampler_logprobs: Sequence[Tensor],
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> list[Tensor]:
    """`exp(log p_trainer - log p_sampler)` of each completion, [T] per row or [1] in the sequence modes.

    Truncated to `clip_min`..`clip_max` (`*_truncate`), or 0 outside of it (`*_mask`). A sampler's log-prob that is NaN
    counts as equal to the trainer's.
    """
    ratios = []
    for trainer_T, sampler_T in zip(trainer_logprobs, sampler_logprobs, strict=True):
        difference = (trainer_T - sampler_T).nan_to_num(nan=0.0)
        if mode.startswith("sequence_"):
            difference = difference.sum(0, keepdim=True)
        ratio = difference.exp()
        if mode.endswith("_truncate"):
            ratio = ratio.clamp(min=clip_min, max=clip_max) if (clip_min, clip_max) != (None, None) else ratio
        else:
            is_outside = (ratio < (clip_min if clip_min is not None else -torch.inf)) | (
                ratio > (clip_max if clip_max is not None else torch.inf)
            )
            ratio = ratio.masked_fill(is_outside, 0.0)
        ratios.append(ratio)
    return ratios
