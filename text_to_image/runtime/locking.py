"""One run in a folder at a time, or on a file: a lock file that says who holds it, renewed while its process lives.

It is made by `os.link`, which is atomic on NFS too, where flock may not reach other machines. Standard library only.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from runtime.errors import EXIT_FAILED, UserError, WorkError

LOCK = ".lock"
RENEWED_EVERY, STALE_AFTER, TAKING_LASTS = 20, 300, 10  # seconds


class LockHeld(UserError):
    """Another run holds the lock; `holder` says who, in words."""

    def __init__(self, holder: str, instead: str):
        super().__init__(f"{holder}; wait for it, or {instead}")
        self.holder = holder


class RunLock:
    """Held until `release`, at the latest until the process ends; one that is killed leaves it to be taken over.

    A refusal says what the holder does (`work`) and what may be done `instead` of waiting for it.
    """

    def __init__(
        self, folder: Path, name: str = LOCK, work: str = "trains into it", instead: str = "name another --output_dir"
    ):
        self.path, self.work, self.instead = folder / name, work, instead
        self.held, self.ended = False, threading.Event()

    def take(self) -> None:
        """Held, a UserError, where another run of this folder is alive; WorkError where no lock can be made."""
        if self.held:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise WorkError(f"{self.path}: cannot be made ({error.strerror})") from None
        self.held = True
        atexit.register(self.release)
        threading.Thread(target=self._renew, daemon=True).start()

    def _take(self) -> None:
        beside = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.part")
        beside.write_text(json.dumps(this_process()))
        try:
            while not _link(beside, self.path):
                if why := held_by(self.path, beside, self.work):
                    raise LockHeld(f"{self.path.parent}: {why}", self.instead)
                self._remove_dead(beside)
        finally:
            beside.unlink()

    def _remove_dead(self, beside: Path) -> None:
        """Removes a lock that nobody holds any more. One process at a time, or it might be another's new one."""
        taking = self.path.with_name(f"{self.path.name}.taking")
        if not _link(beside, taking):
            with contextlib.suppress(FileNotFoundError):
                if _age(taking, beside) > TAKING_LASTS:  # killed on the way
                    taking.unlink()
            time.sleep(0.02)
            return
        try:
            if not held_by(self.path, beside, self.work):
                self.path.unlink(missing_ok=True)
        finally:
            taking.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self.ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError, ValueError):
                if json.loads(self.path.read_text()) != this_process():
                    self._lost()
                os.utime(self.path)

    def _lost(self) -> None:
        """This process stood still for long, and another run has the folder now: nothing more may be written."""
        if not self.ended.is_set():
            print(f"error: {self.path}: taken over by another run while this one stood still", file=sys.stderr)
            os._exit(EXIT_FAILED)

    def release(self) -> None:
        self.ended.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.path.read_text()) == this_process():
                self.path.unlink()


def _link(existing: Path, new: Path) -> bool:
    """Whether `new` now is the file `existing`; False where there is a `new` already."""
    try:
        os.link(existing, new)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(new, "x") as file:
                file.write(existing.read_text())
        except FileExistsError:
            return False
    return True


def _age(path: Path, beside: Path) -> float:
    """Seconds since `path` was renewed, by the clock that gave `beside` its time just now: the file system's."""
    os.utime(beside)
    return beside.stat().st_mtime - path.stat().st_mtime


def this_process() -> dict:
    """Who holds a lock; `started` tells a process from a later one of the same number."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "space": _process_space(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)) if job else None,
    }


def _process_space() -> str | None:
    """Containers may share a host's name and still number their processes each by itself."""
    try:
        return os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def held_by(path: Path, beside: Path, work: str) -> str | None:
    """Who holds the lock and does the `work`, in words; None where nobody does any more and it may be taken over.

    `beside` is a file of ours on the same file system, whose clock is asked.
    """
    try:
        holder, age = json.loads(path.read_text()), _age(path, beside)
        facts = ("host", "space", "pid", "started", "job", "restart")
        host, space, pid, started, job, restart = (holder[key] for key in facts)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # just released, or cut short by a crash of the machine
    me = this_process()
    if (host, space) == (me["host"], me["space"]):
        alive = _started(pid) == started and pid != me["pid"]
        return f"process {pid} on this host {work}{_of_job(job)}" if alive else None
    if job and job == me["job"] and restart < me["restart"]:
        return None  # this job itself, before it was requeued
    if age > STALE_AFTER:
        return None
    return f"process {pid} on {host} {work}{_of_job(job)}, and was alive {age:.0f} s ago"


def _of_job(job: str | None) -> str:
    return f" (Slurm job {job})" if job else ""


def _started(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since the machine did; None where no such process runs."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZXx" else facts[18]  # one that has ended stays there until its parent asks for it
    except OSError:
        return None if Path("/proc/self").exists() else _answers(pid)


def _answers(pid: int) -> str | None:
    """Without /proc: that it is there at all."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
