"""The device that generation and captioning use, the precision and memory layout that suit it, and its peak memory.

Training gets its device from accelerate, which decides in the same way.
"""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # option numbers of glibc's mallopt


def choose_device() -> torch.device:
    """The GPU if there is one, unless ACCELERATE_USE_CPU, accelerate's own variable, asks for the CPU."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "on", "t", "true", "y", "yes"}
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def best_mixed_precision() -> str | None:
    """'bf16' on a GPU that computes in it, 'fp16' on an older GPU, None on the CPU."""
    if choose_device().type == "cpu":
        return None
    return "bf16" if supports_bf16() else "fp16"


def best_training_precision() -> str | None:
    """As `best_mixed_precision`; on the CPU 'bf16' where it has instructions for that, which makes a step faster."""
    return best_mixed_precision() if choose_device().type == "cuda" else _cpu_precision()


def _cpu_precision() -> str | None:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return None
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else None


def supports_bf16() -> bool:
    """Whether the GPU computes in bf16. Emulation, which PyTorch counts too, is not enough: convolutions fail."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def convolution_memory_format() -> torch.memory_format:
    """The layout of convolution weights in training: channels_last on a GPU, which half-precision kernels want.

    On a CPU the fused AdamW copies channels_last weights, gradients and averages at every step: at SD 1.5's size it
    takes 0.34 s instead of 0.20 s, and the UNet was no faster for it on the CPUs that were measured.
    """
    return torch.channels_last if choose_device().type == "cuda" else torch.contiguous_format


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor on `device`; from CPU to GPU through page-locked memory, so that the copy does not block."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def set_thread_device(device: torch.device) -> None:
    """Makes `device` the GPU that the calling thread uses where none is named; does nothing for a CPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def synchronize() -> None:
    """Waits for the GPU to finish its queue; returns at once on a CPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for reuse instead of returning it to the system.

    By default glibc returns blocks above 32 MB at once, and the kernel zeroes new ones for every layer of a large
    batch: 1.3 s of a 4.5 s training step at SD 1.5's size on a CPU. The cost: the process never shrinks. Does nothing
    without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        # Older versions accept at most 32 MB here.
        glibc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or glibc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        glibc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim


def disable_cudnn_attention() -> None:
    """Leaves attention to the flash and memory-efficient kernels.

    PyTorch prefers cuDNN's on Hopper and later. That one plans anew for every shape, about half a second each
    (pytorch#171627), and buckets, batches and caption lengths make many shapes; it is no faster than flash.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def loading_workers(asked: int | None, device: torch.device) -> int:
    """How many processes read pictures ahead: as `asked`; else, where a GPU would wait, one a core, at most 4.

    More would not fit into the 64 MB of shared memory that a container has by default. The cores are divided by the
    processes that a launcher has started on this machine.
    """
    if asked is not None:
        return asked
    if device.type != "cuda":
        return 0
    return max(1, min(4, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def peak_memory_gb() -> float:
    """Peak memory in GB (1e9 bytes): the GPU's if one is used, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
