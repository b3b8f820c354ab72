"""One run in a folder at a time: a lock file that says who holds it, renewed while its process lives.

It is made by `os.link`, which is atomic on NFS too, where flock may not reach other machines. Standard library only.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from errors import UserError

LOCK = ".lock"
RENEWED_EVERY, STALE_AFTER = 20, 300  # seconds


class RunLock:
    """Held until `release`, at the latest until the process ends; one that is killed leaves it to be taken over."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.ended = threading.Event()

    def take(self) -> None:
        """UserError that names the holder where another run of this folder is alive."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}.part")
        beside.write_text(json.dumps(this_process()))
        try:
            while not _link(beside, self.path):
                with contextlib.suppress(FileNotFoundError):  # released in between
                    self._take_over()
        finally:
            beside.unlink()
        atexit.register(self.release)
        threading.Thread(target=self._renew, daemon=True).start()

    def _take_over(self) -> None:
        """Removes a lock that nobody holds any more, and no other: a second process may be doing the same."""
        judged = self.path.read_text()
        if why := held_by(self.path):
            raise UserError(f"{self.path.parent}: {why}; wait for it, or name another --output_dir")
        aside = self.path.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}.stale")
        os.rename(self.path, aside)
        if aside.read_text() != judged:
            _link(aside, self.path)
        aside.unlink()

    def _renew(self) -> None:
        while not self.ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self.ended.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.path.read_text()) == this_process():
                self.path.unlink()


def _link(existing: Path, new: Path) -> bool:
    try:
        os.link(existing, new)
    except FileExistsError:
        return False
    return True


def this_process() -> dict:
    """Who holds a lock; `started` tells a process from a later one of the same number."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)) if job else None,
    }


def held_by(path: Path) -> str | None:
    """Who holds the lock, in words; None where nobody does any more and it may be taken over."""
    try:
        holder, age = json.loads(path.read_text()), time.time() - path.stat().st_mtime
        host, pid, started, job, restart = (holder[key] for key in ("host", "pid", "started", "job", "restart"))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # just released, or cut short by a crash of the machine
    me = this_process()
    if host == me["host"]:
        alive = _started(pid) == started and pid != me["pid"]
        return f"process {pid} on this host trains into it{_of_job(job)}" if alive else None
    if job and job == me["job"] and restart < me["restart"]:
        return None  # this job itself, before it was requeued
    if age > STALE_AFTER:
        return None
    return f"process {pid} on {host} trains into it{_of_job(job)}, and was alive {age:.0f} s ago"


def _of_job(job: str | None) -> str:
    return f" (Slurm job {job})" if job else ""


def _started(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since the machine did; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
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
