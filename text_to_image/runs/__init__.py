"""A training run's output folder: run.json and its fingerprint, checkpoints, disk space, upload and model card."""
