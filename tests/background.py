"""The training script as a process of its own, to be stopped and killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "text_to_image" / "train_text_to_image.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
PATIENCE = 240  # seconds, then a test fails


class Background:
    """A process group that runs the script with `flags`; standard output and error go to `log`, appended."""

    def __init__(self, log: Path, *flags: object, launcher: list[str] | None = None, **environment: str):
        self.log = log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [sys.executable, *(launcher or []), str(SCRIPT), *map(str, flags)],
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
            )  # fmt: skip

    def until(self, condition: Callable[[], object]) -> "Background":
        """Returns when it holds, or when the process has ended by itself."""
        end = time.monotonic() + PATIENCE
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)
        return self

    def for_at_most(self, seconds: float) -> "Background":
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self

    def send(self, number: signal.Signals) -> "Background":
        self.process.send_signal(number)
        return self

    def kill(self) -> "Background":
        """The whole group at once, as a node that goes down does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self

    def ended(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE)


def count_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
