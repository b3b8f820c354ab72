"""One-file checkpoints for other programs."""
