"""Surrogate training and scoring: Algorithm 1 of the MoSo paper, seeded from end to end."""

from .training import Surrogate, sample_positions, score_surrogates, train_surrogates

__all__ = ["Surrogate", "sample_positions", "score_surrogates", "train_surrogates"]
