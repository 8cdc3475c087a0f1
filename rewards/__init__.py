"""The RLT reward as a formula, and the reward functions that may stand beside it."""

from rewards.extra import EXTRA_REWARDS
from rewards.rlt import RewardBreakdown, RLTReward

__all__ = ["EXTRA_REWARDS", "RLTReward", "RewardBreakdown"]
