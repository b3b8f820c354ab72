"""Files that are whole or absent: written beside, flushed to the disk, renamed. Standard library only."""

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A name to write under, whose file becomes `path` at the end of the block, or leaves no trace when it fails.

    Not `durable`: a crash of the whole machine may leave it empty, for what can be made again.
    """
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield beside
        if path.exists():
            shutil.copymode(path, beside)
        if durable:
            flush_to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """A file's content, or a folder's list of names, outlives a crash of the machine from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """What processes that were killed have left half-written in `folder`."""
    for path in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
        if not path.name.startswith(".lock"):  # of another process that waits for this one
            path.unlink(missing_ok=True)


def remove_stale_partial_files(folder: Path) -> None:
    """Of what is half-written in `folder` that whose process, of this host, is gone: others may be at work there."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)


FORMAT = 2  # of the files: another number, and none of the older ones is read


def hash_key(*facts: str | int) -> str:
    return hashlib.sha256(repr((FORMAT, *facts)).encode()).hexdigest()[:32]
