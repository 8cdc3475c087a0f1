"""The RLT reward: formula (`rlt`), from completions to rewards (`rollout`), plain texts (`offline`)."""

from rewards.correctness import CorrectnessReward
from rewards.format import FormatReward
from rewards.offline import score_texts
from rewards.rlt import RewardBreakdown, RLTReward
from rewards.rollout import RolloutScorer

EXTRA_REWARDS = {"format": FormatReward, "correctness": CorrectnessReward}
"""Reward functions that `extra_rewards` may name beside the RLT reward; each is built with the run's tags."""

__all__ = ["EXTRA_REWARDS", "RLTReward", "RewardBreakdown", "RolloutScorer", "score_texts"]
