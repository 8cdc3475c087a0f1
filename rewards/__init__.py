"""The RLT reward as a formula, and the reward functions that may stand beside it."""

from rewards.correctness import CorrectnessReward
from rewards.format import FormatReward
from rewards.rlt import RewardBreakdown, RLTReward

EXTRA_REWARDS = {"format": FormatReward, "correctness": CorrectnessReward}
"""Reward functions that `extra_rewards` may name beside the RLT reward; each is built with the run's tags."""

__all__ = ["EXTRA_REWARDS", "RLTReward", "RewardBreakdown"]
