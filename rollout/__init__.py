"""Rollouts: prompts with their sampled completions, and what is found out about them on the way to a gradient."""
