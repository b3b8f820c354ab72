"""Stable Diffusion models: found and checked, loaded and saved, text encoding, samplers, LoRA."""
