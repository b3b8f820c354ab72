"""One-file checkpoints and LoRAs that AUTOMATIC1111, ComfyUI and InvokeAI load."""
