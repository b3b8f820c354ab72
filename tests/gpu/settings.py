"""What every group is given: where to write, how long, and the sizes, which are tiny for a try on the CPU."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from gpu.rows import Skipped

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Of one run of the script."""

    out: Path
    work: Path  # a temporary folder that all groups share
    tiny: bool
    deadline: float  # seconds since the epoch
    diffusers_script: Path | None = None

    @property
    def resolution(self) -> int:
        """Pixels, of both sides of each picture."""
        return 64 if self.tiny else 512

    @property
    def warm_up(self) -> int:
        return 1 if self.tiny else 3

    @property
    def timed(self) -> int:
        """Steps that are timed after the warm-up."""
        return 2 if self.tiny else 10

    def batch(self, size: int) -> int:
        return min(size, 2) if self.tiny else size

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()


def need_gpu() -> None:
    """Skips what only a GPU can show."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped("needs a GPU")


def need_compiler() -> None:
    """Skips what torch.compile is needed for where it has no C compiler."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise Skipped("needs a C compiler")
