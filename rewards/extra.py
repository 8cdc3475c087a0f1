"""Extra rewards: those that `extra_rewards` may name beside the RLT reward."""

from rewards.correctness import CorrectnessReward
from rewards.format import FormatReward

EXTRA_REWARDS = {"format": FormatReward, "correctness": CorrectnessReward}
"""Name -> reward function, which is built with the run's tags."""
