"""Whether a model's loss is taken of its head's output, and which label belongs to which row."""
