"""Rollouts: prompts with their completions, then log-probs, rewards and advantages, up to the micro-batches."""
