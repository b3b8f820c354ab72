"""What machine it is: the card, the driver, the versions; and the card's measured peak of bf16 products."""

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import version

import torch

from gpu.rows import Measurement
from gpu.settings import ROOT, Settings, need_gpu

MATRIX = 8192  # rows and columns of the product that the peak is measured with
PEAK, PEAK_COLUMN = "bf16 peak", "measured bf16 peak, TFLOP/s"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def describe_machine(settings: Settings) -> list[Measurement]:
    return [
        Measurement("versions", machine_facts, 0),
        Measurement(PEAK, lambda: {PEAK_COLUMN: round(bf16_peak(), 1)}, 1),
    ]


def machine_facts() -> dict:
    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "card": torch.cuda.get_device_name() if has_gpu else "none",
        "card's memory, GB": round(torch.cuda.mem_get_info()[1] / 1e9, 1) if has_gpu else 0,
        "driver": ask_nvidia_smi("driver_version") or "none",
        "CUDA": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() or "none" if has_gpu else "none",
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit that is measured, and whether files differ from it; $COMMIT where there is no repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return name.stdout.strip() + (" and changes" if changed.stdout.strip() else "")


def ask_nvidia_smi(fields: str) -> str:
    """What nvidia-smi says of the first card; empty where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def bf16_peak(rounds: int = 30) -> float:
    """TFLOP/s of a large bf16 product: what this card really reaches, not what its data sheet says."""
    need_gpu()
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(rounds):
        left @ right
    torch.cuda.synchronize()
    return rounds * 2 * MATRIX**3 / (time.perf_counter() - begun) / 1e12


def gpu_answers() -> bool:
    """Whether the GPU can still be used by this process: after an illegal access it cannot. True without a GPU."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def bf16_works() -> bool:
    """Whether training takes --mixed_precision bf16 here."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
