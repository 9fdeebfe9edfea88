"""What every job should take on a GPU: from bytes, products, instructions and ceilings alone."""
