"""Stable Diffusion models: loaded and saved, text encoding, samplers, LoRA."""
