"""Checkpoint folders, prompts, and weights that move between host and device."""
