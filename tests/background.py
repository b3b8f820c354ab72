"""Runs the scripts as processes of their own, to be stopped and killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

SCRIPTS = Path(__file__).resolve().parents[1] / "text_to_image"
TRAIN, INFERENCE = SCRIPTS / "train_text_to_image.py", SCRIPTS / "inference.py"
PATIENCE = 240  # seconds, then a test fails


class Background:
    """A process group that runs `script` with `flags`; its standard output and error are appended to `log`."""

    started: ClassVar[list["Background"]] = []

    def __init__(self, log: Path, *flags: object, script: Path = TRAIN, **environment: str):
        self.log = log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, flags)],
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
            )  # fmt: skip
        self.started.append(self)

    def until(self, condition: Callable[[], object]) -> "Background":
        """Waits until `condition()` is true, or until the process has ended by itself."""
        end = time.monotonic() + PATIENCE
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)
        return self

    def for_at_most(self, seconds: float) -> "Background":
        """Waits so long, or until the process has ended."""
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


def start(log: Path, processes: int, *flags: object, script: Path = TRAIN) -> list[Background]:
    """Starts as many processes of one run, without a launcher between, so that a test can signal each."""
    if processes == 1:
        return [Background(log, *flags, script=script)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [log, *(log.with_name(f"{log.name}-{rank}") for rank in range(1, processes))]
    return [
        Background(logs[r], *flags, script=script, RANK=str(r), LOCAL_RANK=str(r), **environment)
        for r in range(processes)
    ]


def kill(run: list[Background]) -> bool:
    """Kills all processes of a run; returns whether any was still running."""
    for process in run:
        process.kill()
    codes = [process.ended() for process in run]
    return -signal.SIGKILL in codes


def finish(run: list[Background]) -> None:
    """Waits until all processes of a run have ended, with exit code 0."""
    for process in run:
        assert process.ended() == 0, process.log.read_text()


def count_rows(folder: Path) -> int:
    """How many steps metrics.jsonl has."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
