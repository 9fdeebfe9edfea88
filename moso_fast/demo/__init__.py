"""The demonstration: from 1,797 real images to a pruned data set, with the evidence."""
