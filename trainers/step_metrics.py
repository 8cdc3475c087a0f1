"""Metrics of one step: of its rollout, and TRL's metrics of a loss combined over the micro-batches.

The names are TRL's, so that tables and dashboards made for it go on working.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any

import torch
from torch import Tensor

from rollout.packing import MicroBatch
from rollout.types import Rollout


def rollout_metrics(
    rollout: Rollout, std_B: Tensor, reward_names: Sequence[str], reward_weights_F: Tensor
) -> dict[str, float]:
    """Lengths, share of completions that were cut off, rewards, share of rows that nothing can be learned from.

    `std_B`: the standard deviation that each row's reward was compared by.
    """
    rewards_BF = rollout.rewards_BF
    assert rewards_BF is not None
    completions = rollout.completions
    lengths = [len(c.token_ids) for c in completions]
    ended = [len(c.token_ids) for c in completions if not c.is_truncated] or [0]
    metrics = {
        "completions/clipped_ratio": sum(c.is_truncated for c in completions) / len(completions),
        "frac_reward_zero_std": torch.isclose(std_B, torch.zeros_like(std_B)).float().mean().item(),
    }
    for name, values in (("", lengths), ("_terminated", ended)):
        metrics |= {
            f"completions/mean{name}_length": sum(values) / len(values),
            f"completions/min{name}_length": float(min(values)),
            f"completions/max{name}_length": float(max(values)),
        }
    for name, values_B in zip(reward_names, rewards_BF.T, strict=True):
        metrics |= {f"rewards/{name}/mean": values_B.nanmean().item(), f"rewards/{name}/std": _std(values_B)}
    total_B = (rewards_BF * reward_weights_F).nansum(-1)[~rewards_BF.isnan().all(-1)]
    return metrics | {"reward": total_B.mean().item(), "reward_std": _std(total_B)}


def sampler_metrics(
    trainer: Sequence[Tensor], sampler: Sequence[Tensor], importance_ratios: Sequence[Tensor]
) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's ([T] per row), and the weights that correct for it."""
    ratio_N = torch.cat(list(importance_ratios))
    difference_N = (torch.cat(list(trainer)) - torch.cat(list(sampler))).abs()
    difference_N = difference_N[~difference_N.isnan()]
    return {
        "sampling/sampling_logp_difference/mean": difference_N.mean().item(),
        "sampling/sampling_logp_difference/max": difference_N.max().item(),
        "sampling/importance_sampling_ratio/mean": ratio_N.mean().item(),
        "sampling/importance_sampling_ratio/min": ratio_N.min().item(),
        "sampling/importance_sampling_ratio/max": ratio_N.max().item(),
    }


def _std(values_B: Tensor) -> float:
    return values_B[~values_B.isnan()].std().item()


class StepMetrics:
    """Metrics that TRL's loss logs for each micro-batch, combined to one figure per step.

    Means over tokens are weighted by a micro-batch's tokens, means over rows by its rows; minima and maxima are
    those of the step. (TRL averages micro-batches of equal size without weights.)
    """

    def __init__(self, trainer: Any) -> None:
        of_rows = ["vespo/"]
        if trainer.importance_sampling_level == "sequence":
            of_rows += ["clip_ratio/", "cispo_clip_ratio"]
        if trainer.vllm_importance_sampling_mode.startswith("sequence_"):
            of_rows.append("sampling/importance_sampling_ratio/")
        self._of_rows = tuple(of_rows)
        self._recorded: list[tuple[MicroBatch, dict[str, list[float]]]] = []

    @contextmanager
    def of_micro_batch(self, trainer: Any, batch: MicroBatch) -> Iterator[None]:
        """Collect what `trainer` logs while it works on `batch`."""
        before, trainer._metrics["train"] = trainer._metrics["train"], defaultdict(list)
        try:
            yield
        finally:
            self._recorded.append((batch, dict(trainer._metrics["train"])))
            trainer._metrics["train"] = before

    def combined(self) -> dict[str, float]:
        names = dict.fromkeys(name for _, metrics in self._recorded for name in metrics)
        return {name: self._combine(name) for name in names}

    def _combine(self, name: str) -> float:
        found = [(batch, metrics[name][0]) for batch, metrics in self._recorded if name in metrics]
        found = [(batch, value) for batch, value in found if not isnan(value)]
        if not found:
            return float("nan")
        if name.endswith(("min", "max")):
            return (min if name.endswith("min") else max)(value for _, value in found)
        weights = [batch.row_frac if name.startswith(self._of_rows) else batch.token_frac for batch, _ in found]
        return sum(w * value for w, (_, value) in zip(weights, found, strict=True)) / (sum(weights) or 1.0)
