"""The scripts as processes of their own, to be stopped and killed."""

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
TRAIN, DRAW = SCRIPTS / "train_text_to_image.py", SCRIPTS / "inference.py"
PATIENCE = 240  # seconds, then a test fails


class Background:
    """A process group that runs `script` with `flags`; standard output and error go to `log`, appended."""

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


def start(log: Path, processes: int, *flags: object, script: Path = TRAIN) -> list[Background]:
    """As many processes of one run, without a launcher between, so that each can be reached."""
    if processes == 1:
        return [Background(log, *flags, script=script)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [log, *(log.with_name(f"{log.name}-{rank}") for rank in range(1, processes))]
    return [
        Background(logs[r], *flags, script=script, RANK=str(r), LOCAL_RANK=str(r), **there) for r in range(processes)
    ]


def kill(run: list[Background]) -> bool:
    """All at once; whether it hit any."""
    for one in run:
        one.kill()
    codes = [one.ended() for one in run]
    return -signal.SIGKILL in codes


def finish(run: list[Background]) -> None:
    for one in run:
        assert one.ended() == 0, one.log.read_text()


def count_rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
