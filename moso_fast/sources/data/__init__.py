"""Batches of samples, their labels and numbers, from loaders and data sets of many kinds."""
