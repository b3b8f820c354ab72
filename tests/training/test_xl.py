"""Stable Diffusion XL through the training script: what its UNet is told, and what comes of a run."""
