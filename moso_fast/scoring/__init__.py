"""From a model, data and checkpoints to scores: jobs, parts, groups that can be resumed."""
