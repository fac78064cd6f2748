"""Rollouts: prompts answered by the policy as it stands, and what the answers are worth."""
