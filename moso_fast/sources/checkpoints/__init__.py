"""Checkpoints: weights and learning rates, in the files that training leaves."""
