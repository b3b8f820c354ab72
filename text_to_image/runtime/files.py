"""Files that are complete or absent: written under another name, flushed to disk, renamed. Standard library only."""

import contextlib
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import FILE_TOO_LARGE, WriteError, first_line, is_disk_full

CACHE_FORMAT = 2  # of all cached files; raise it when their content changes, and older ones are not read any more


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a name to write to. At the end of the block that file becomes `path`; on an error it is removed.

    Raises WriteError where the disk is full, any other error as it is. Without `durable` a crash of the machine may
    leave `path` empty: for files that can be made again.
    """
    partial = _partial_name(path)
    try:
        yield partial
        if path.exists():
            set_mode(partial, path.stat().st_mode)
        if durable:
            flush_to_disk(partial)
        os.replace(partial, path)
    except Exception as error:
        raise_disk_full(path, error, partial)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill. At the end of the block it becomes `path`; on an error it is removed.

    Where another process makes `path` meanwhile, that one stays. What killed processes left there is removed. Raises
    WriteError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partial_files(path.parent)
    partial = _partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process of this number, as in containers
    try:
        partial.mkdir()
        yield partial
        for written in partial.rglob("*"):
            flush_to_disk(written)
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():  # otherwise another process was faster
                raise
    except Exception as error:
        raise_disk_full(path, error, partial)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames a folder, if it is there, so that another can take its name; returns its new name, to be removed.

    OSError if it cannot be renamed. A name that `remove_stale_partial_files` knows, as removing it may fail too.
    """
    aside = _partial_name(folder.with_name(f"{folder.name}.old"))
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier process of this number
    if folder.exists():
        folder.rename(aside)
    return aside


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def raise_disk_full(path: Path, error: Exception, partial: Path) -> None:
    """WriteError if `error` is a full disk's: `partial` is what has been written of `path` and will be removed."""
    if is_disk_full(error):
        written = size_on_disk(partial)
        raise write_error(path.parent, path.name, error, f"more than {format_size(written)}", written) from error


def write_error(folder: Path, name: str, error: Exception, needed: str, removed: int = 0) -> WriteError:
    """A line with the folder, what is needed and what is free there, once `removed` bytes are gone again."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.is_dir())
    free = format_size(shutil.disk_usage(existing).free + removed)
    reason = isinstance(error, OSError) and error.strerror or first_line(error)
    return WriteError(
        f"{folder}: {name} could not be written ({reason}): it needs {needed}, {free} are free; {what_helps(reason)} "
        "and run the same command again"
    )


def what_helps(reason: str) -> str:
    """For a file that could not be written for this `reason`, the system's words."""
    return "raise `ulimit -f`" if FILE_TOO_LARGE in reason else "make room"


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def format_size(size: float) -> str:
    """Bytes in the unit one would say: '10.3 GB', '146 MB' or '3 kB'."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.3g} {name}"


def set_mode(path: Path, mode: int) -> None:
    """chmod, where the file system has modes: exFAT, FAT and some Windows shares refuse them."""
    with contextlib.suppress(OSError):
        path.chmod(stat.S_IMODE(mode))


def umask() -> int:
    """The modes that new files do not get. The system tells it only when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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
    """Removes what a killed process left half written in `folder` and one level below: files and folders."""
    for path in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
        if not path.name.startswith(".lock"):  # belongs to another process that waits for the lock
            _remove(path)


def remove_stale_partial_files(folder: Path) -> None:
    """Removes what this host's dead processes left half written: other processes may be writing to `folder`."""
    for path in folder.glob(f".*.{socket.gethostname()}.*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def hash_key(*facts: str | int) -> str:
    """32 hex digits that name a cached file after everything its content depends on."""
    return hashlib.sha256(repr((CACHE_FORMAT, *facts)).encode()).hexdigest()[:32]
