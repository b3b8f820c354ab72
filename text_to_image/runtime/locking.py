"""One run at a time in a folder or on a file: a lock file that names its holder, renewed while the holder lives.

The lock file is made by `os.link`, which is atomic on NFS too; flock may not reach other machines there. Standard
library only.
"""

import atexit
import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runtime.errors import EXIT_FAILED, NO_PLACE, NOT_WRITABLE, UserError, WorkError

LOCK_FILE = ".lock"
RENEW_EVERY = 20  # seconds
STALE_AFTER = 300  # seconds without renewal, for a holder on another host
WATCHED_RENEWALS = 2.5  # in which a living holder renews the lock at least once
TAKEOVER_TIMEOUT = 10  # seconds; a process that takes over a stale lock needs far less


class LockHeld(UserError):
    """Another run holds the lock; `holder` describes it."""

    def __init__(self, holder: str, instead: str):
        super().__init__(f"{holder}; wait for it, or {instead}")
        self.holder = holder


class RunLock:
    """Held from `take` until `release` or the end of the process. The lock of a killed process can be taken over.

    The error message says what the holder does (`work`) and what to do `instead` of waiting.
    """

    def __init__(
        self,
        folder: Path,
        name: str = LOCK_FILE,
        work: str = "trains into it",
        instead: str = "name another --output_dir",
    ):
        self.folder, self.name, self.work, self.instead = folder, name, work, instead
        self.held, self.released = False, threading.Event()
        self._opened: int | None = None  # a descriptor of the locked folder, which knows it wherever it is moved

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def take(self) -> None:
        """Raises LockHeld, a UserError, if another run holds the lock; UserError or WorkError if none can be made."""
        if self.held:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            if error.errno in (*NOT_WRITABLE, *NO_PLACE, errno.EEXIST):
                raise UserError(f"{self.path}: cannot be made ({error.strerror}); {self.instead}") from None
            raise WorkError(f"{self.path}: cannot be made ({error.strerror})") from None
        self.held = True
        atexit.register(self.release)
        threading.Thread(target=self._renew, daemon=True).start()

    def follow_folder(self) -> bool:
        """Sets `folder` to where the locked folder was moved. Where it was removed it is made again, locked: True.

        Raises LockHeld where another run has made it, UserError or WorkError where it cannot be made.
        """
        if not self.held:
            return False
        if found := self._locate():
            self.folder = found
            return False
        self.release()
        self.held, self.released = False, threading.Event()
        self.take()
        return True

    def _locate(self) -> Path | None:
        """Where the locked folder is now; None where it was removed, or moved to another file system."""
        if (opened := self._opened) is None:  # nobody can tell
            return self.folder
        candidates = [self.folder]
        with contextlib.suppress(OSError):  # Linux's
            candidates.append(Path(os.readlink(f"/proc/self/fd/{opened}")))
        return next((folder for folder in candidates if self._is_locked(folder, opened)), None)

    def _is_locked(self, folder: Path, opened: int) -> bool:
        """Whether it is the folder that was locked. Not every file system keeps a folder's number: the lock tells."""
        with contextlib.suppress(OSError, ValueError):
            return (
                os.path.samestat(os.stat(folder), os.fstat(opened))
                or json.loads((folder / self.name).read_text()) == this_process()
            )
        return False

    def _take(self) -> None:
        own = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.part")
        own.write_text(json.dumps(this_process()))
        try:
            self._watch_silent_lock(own)
            while not _link(own, self.path):
                if holder := describe_holder(self.path, own, self.work):
                    raise LockHeld(f"{self.path.parent}: {holder}", self.instead)
                self._remove_stale(own)
            with contextlib.suppress(OSError):
                self._opened = os.open(self.folder, getattr(os, "O_PATH", os.O_RDONLY))
        finally:
            own.unlink()

    def _watch_silent_lock(self, own: Path) -> None:
        """Waits until a lock of another host that looks old is renewed, or has had the time for it.

        A clock that jumps, forwards or back, makes a living run's lock look old.
        """
        if not _is_silent(self.path, own):
            return
        seconds = WATCHED_RENEWALS * RENEW_EVERY
        print(f"{self.path}: not renewed for long; it is watched for {seconds:.0f} s", file=sys.stderr)
        end = time.monotonic() + seconds
        while time.monotonic() < end and _is_silent(self.path, own):
            time.sleep(min(1, seconds / 10))

    def _remove_stale(self, own: Path) -> None:
        """Removes a lock that nobody holds. One process at a time, or it could be another process's new lock."""
        takeover = self.path.with_name(f"{self.path.name}.taking")
        if not _link(own, takeover):
            with contextlib.suppress(FileNotFoundError):
                if _age(takeover, own) > TAKEOVER_TIMEOUT:  # its process was killed in between
                    takeover.unlink()
            time.sleep(0.02)
            return
        try:
            if not describe_holder(self.path, own, self.work):
                self.path.unlink(missing_ok=True)
        finally:
            takeover.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self.released.wait(RENEW_EVERY):
            self.renew()

    def renew(self) -> None:
        """Says that the holder lives. Ends the process where another run has taken the lock over."""
        with contextlib.suppress(OSError, ValueError):
            if folder := self._locate():
                if json.loads((folder / self.name).read_text()) != this_process():
                    self._exit_if_lost(folder / self.name)
                os.utime(folder / self.name)

    def _exit_if_lost(self, path: Path) -> None:
        """This process was suspended for long and another run has the lock: nothing more may be written."""
        if not self.released.is_set():
            print(f"error: {path}: taken over by another run while this one was suspended", file=sys.stderr)
            os._exit(EXIT_FAILED)

    def release(self) -> None:
        self.released.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError, ValueError):
            folder = self._locate()
            if folder and json.loads((folder / self.name).read_text()) == this_process():
                (folder / self.name).unlink()
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None


def _link(existing: Path, new: Path) -> bool:
    """Makes `new` a hard link to `existing`; False if there is a file `new` already."""
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


def _age(path: Path, own: Path) -> float:
    """Seconds since `path` was renewed, by the file system's clock: our `own` file beside it is touched to read it."""
    os.utime(own)
    return own.stat().st_mtime - path.stat().st_mtime


def this_process() -> dict[str, Any]:
    """The content of our lock file; `started` distinguishes a process from a later one with the same pid."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "space": _pid_namespace(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)) if job else None,
    }


def _pid_namespace() -> str | None:
    """Identifies the namespace that pids are counted in: containers may share a host name and not their pids."""
    try:
        return os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def describe_holder(path: Path, own: Path, work: str) -> str | None:
    """Who holds the lock `path` and does the `work`; None if nobody does and it may be taken over.

    `own` is a file of this process on the same file system, see `_age`.
    """
    holder = _read_holder(path)
    if holder is None or (alive := _is_alive(holder)) is False:
        return None
    what = f"{work}{_job_note(holder['job'])}"
    if alive:
        return f"process {holder['pid']} on this host {what}"
    with contextlib.suppress(FileNotFoundError):  # just released
        if abs(age := _age(path, own)) <= STALE_AFTER:
            return f"process {holder['pid']} on {holder['host']} {what}, and was alive {age:.0f} s ago"
    return None


def _is_silent(path: Path, own: Path) -> bool:
    """Whether only its age says that the holder of the lock has ended."""
    holder = _read_holder(path)
    with contextlib.suppress(FileNotFoundError):
        return holder is not None and _is_alive(holder) is None and abs(_age(path, own)) > STALE_AFTER
    return False


def _read_holder(path: Path) -> dict[str, Any] | None:
    """The content of a lock; None if it was just released, or truncated by a crash of the machine."""
    try:
        holder = json.loads(path.read_text())
        return {key: holder[key] for key in ("host", "space", "pid", "started", "job", "restart")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a lock's holder still runs; None where only the age of the lock tells."""
    me = this_process()
    if (holder["host"], holder["space"]) == (me["host"], me["space"]):
        return _start_time(holder["pid"]) == holder["started"] and holder["pid"] != me["pid"]
    if holder["job"] and holder["job"] == me["job"] and holder["restart"] < me["restart"]:
        return False  # this very job, before it was requeued
    return None


def _job_note(job: str | None) -> str:
    return f" (Slurm job {job})" if job else ""


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if it is not running."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZXx" else fields[18]  # a zombie has ended, and waits for its parent
    except OSError:
        return None if Path("/proc/self").exists() else _start_time_without_proc(pid)


def _start_time_without_proc(pid: int) -> str | None:
    """Not the time, which only /proc has, but whether the process exists: 'running' or None."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
