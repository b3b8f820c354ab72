"""The scripts as processes of their own, to be stopped and killed.

They are forked from a process that has imported the libraries already, which takes a script 5 s; else they are what
`python script.py` is. test_readmes.py and tests/slurm/ start them the ordinary way.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import ClassVar

SCRIPTS = Path(__file__).resolve().parents[1] / "text_to_image"
TRAIN, INFERENCE = SCRIPTS / "train_text_to_image.py", SCRIPTS / "inference.py"
PATIENCE = 240  # seconds, then a test fails
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["background", "training.train", "generation.generate", "captioning.caption_folder"])


class Background:
    """A process group that runs `script` with `flags`; its output is appended to `log`, errors to `err` if given."""

    started: ClassVar[list["Background"]] = []

    def __init__(self, log: Path, *flags: object, script: Path = TRAIN, err: Path | None = None, **environment: str):
        self.log = log
        log.touch()
        start_server()
        words = [str(script), *map(str, flags)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
        self._process = WARM.Process(target=_run_script, args=(words, log, err or log, environment))
        self._process.start()
        self.started.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def until(self, condition: Callable[[], object]) -> "Background":
        """Waits until `condition()` is true, or until the process has ended by itself."""
        end = time.monotonic() + PATIENCE
        while not condition() and self.running:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)
        return self

    def for_at_most(self, seconds: float) -> "Background":
        self._process.join(seconds)
        return self

    def send(self, number: signal.Signals) -> "Background":
        os.kill(self.pid, number)
        return self

    def kill(self) -> "Background":
        """The whole group at once, as a node that goes down does."""
        if self.running:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it leads no group yet
                self._process.kill()
        return self

    def ended(self) -> int:
        """Its exit code."""
        self._process.join(PATIENCE)
        assert not self.running, self.log.read_text()
        return self._process.exitcode


@functools.cache
def start_server() -> None:
    """The process that the others are forked from; only the environment can tell it where our modules are."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _run_script(words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    os.setsid()
    for path, stream in ((out, 1), (err, 2)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as the interpreter's end does, but multiprocessing's does not


def run_script(script: Path, *flags: object, **environment: str) -> subprocess.CompletedProcess:
    """The script from its start to its end: exit code, standard output and error."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        code = Background(out, *flags, script=script, err=err, **environment).ended()
        return subprocess.CompletedProcess([script, *flags], code, out.read_text(), err.read_text())


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
