"""Training: the loop, the optimizer, checkpoints, what is observed, and the dry run."""
