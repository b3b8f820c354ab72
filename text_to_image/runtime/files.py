"""Files that are complete or absent: written under another name, flushed to disk, renamed. Standard library only."""

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

CACHE_FORMAT = 2  # of all cached files; raise it when their content changes, and older ones are not read any more


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a name to write to. At the end of the block that file becomes `path`; on an error it is removed.

    Without `durable` a crash of the machine may leave `path` empty: for files that can be made again.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        if durable:
            flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """fsync: a file's content, or a folder's list of names, survives a crash of the machine from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Removes files in `folder` and one level below that a killed process left half written."""
    for path in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
        if not path.name.startswith(".lock"):  # belongs to another process that waits for the lock
            path.unlink(missing_ok=True)


def remove_stale_partial_files(folder: Path) -> None:
    """Removes half-written files of this host's dead processes only: other processes may be writing to `folder`."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)


def hash_key(*facts: str | int) -> str:
    """32 hex digits that name a cached file after everything its content depends on."""
    return hashlib.sha256(repr((CACHE_FORMAT, *facts)).encode()).hexdigest()[:32]
