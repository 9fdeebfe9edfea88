"""What is read: arrays on disk, heads, checkpoints, and the batches of a data set."""
