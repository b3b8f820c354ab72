"""One-file checkpoints that AUTOMATIC1111, ComfyUI and InvokeAI load."""
