"""Which device drawing and captioning use, as accelerate chooses it in training, and the precision that suits it."""

import os

import torch


def choose_device() -> torch.device:
    """The GPU where there is one, unless ACCELERATE_USE_CPU, accelerate's own switch, asks for the CPU."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "on", "t", "true", "y", "yes"}
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def mixed_precision() -> str | None:
    """'bf16' on a GPU that computes in it, 'fp16' on an older one, None without one."""
    if choose_device().type == "cpu":
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
