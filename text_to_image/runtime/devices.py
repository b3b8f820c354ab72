"""Which device drawing and captioning use, as accelerate chooses it in training, and the precision that suits it."""

import contextlib
import ctypes
import os
import resource
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def choose_device() -> torch.device:
    """The GPU where there is one, unless ACCELERATE_USE_CPU, accelerate's own switch, asks for the CPU."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "on", "t", "true", "y", "yes"}
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def best_mixed_precision() -> str | None:
    """'bf16' on a GPU that computes in it, 'fp16' on an older one, None without one."""
    if choose_device().type == "cpu":
        return None
    return "bf16" if supports_bf16() else "fp16"


def supports_bf16() -> bool:
    """Whether the GPU does so itself: PyTorch also calls it supported where it is emulated and convolutions fail."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def convolution_memory_format() -> torch.memory_format:
    """How convolutions' weights are laid out in training: on a GPU in channels_last, in which it computes in half
    precision.

    On a CPU the fused AdamW makes copies of channels_last weights, gradients and averages at every step: at SD 1.5's
    size it takes 0.34 s in place of 0.20 s, and the UNet itself was as fast either way on the CPUs measured last.
    """
    return torch.channels_last if choose_device().type == "cuda" else torch.contiguous_format


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor on `device`. To a GPU it goes through page-locked memory, so that nothing waits until it is there."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def synchronize() -> None:
    """Until the GPU has done what it was given; a CPU always has."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Lets memory that is freed be used again: glibc gives blocks above 32 MB back to the system at once, which then
    clears them for every layer of a large batch (a quarter of its time on a CPU; at SD 1.5's size 1.3 s of 4.5 s of a
    training step). The process keeps what it once had. Elsewhere than on glibc nothing."""
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        # An older one takes no more than 32 MB here.
        glibc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or glibc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        glibc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_memory_gb() -> float:
    """The most that has been in use: the GPU's memory where one is used, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
