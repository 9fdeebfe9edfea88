"""Whole-network gradients: their mean, each sample's dot product with it, and its norm."""
