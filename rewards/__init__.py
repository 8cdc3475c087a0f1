"""The RLT reward: formula (`rlt`), from completions to rewards (`rollout`), plain texts (`texts`)."""

from rewards.correctness import CorrectnessReward
from rewards.format import FormatReward
from rewards.rlt import RewardBreakdown, RLTReward
from rewards.rollout import RolloutScorer
from rewards.texts import TextScorer, score_texts
from rewards.with_models import score_with_models

EXTRA_REWARDS = {"format": FormatReward, "correctness": CorrectnessReward}
"""Reward functions that `extra_rewards` may name beside the RLT reward; each is built with the run's tags."""

__all__ = [
    "EXTRA_REWARDS",
    "RLTReward",
    "RewardBreakdown",
    "RolloutScorer",
    "TextScorer",
    "score_texts",
    "score_with_models",
]
