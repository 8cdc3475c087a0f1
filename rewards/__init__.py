"""The RLT reward: formula (`rlt`), from completions to rewards (`rollout`), plain texts (`offline`)."""

from rewards.offline import score_texts
from rewards.rlt import RewardBreakdown, RLTReward
from rewards.rollout import RolloutScorer

__all__ = ["RLTReward", "RewardBreakdown", "RolloutScorer", "score_texts"]
