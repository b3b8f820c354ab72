"""What is known of files that were read before, so that a start reads none of them again: kept beside the encodings.

A file counts as unchanged while its size, its times and its inode are the same, as for git. A network file system may
tell an old `stat` for up to a minute after another machine has changed a file.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from metadata.containers import container_of
from runtime.files import atomic_write

FILE = "files-1.jsonl"  # another number where what is found of a file changes
SETTLED = 2.0  # seconds: a file changed since may change again without another time, as clocks of file systems tick
Stat = list[int]
Known = dict[str, tuple[Stat | list[str], dict]]
Fact = TypeVar("Fact")


class FileFacts:
    """Facts about files, such as their hashes: JSON values by the name of the fact."""

    def __init__(self, known: Known | None = None):
        self._known = known or {}  # {path: (stat, {name: fact})}
        self._changed = False

    @classmethod
    def load(cls, paths: Iterable[Path]) -> "FileFacts":
        """What files of `save` say, later ones first; a damaged line is nothing known."""
        known: Known = {}
        for path in paths:
            for line in _lines(path):
                try:
                    name, stat, facts = json.loads(line)
                    known[name] = (list(stat), dict(facts))
                except (ValueError, TypeError):
                    continue
        return cls(known)

    def of(self, path: Path, name: str, find: Callable[[], Fact]) -> Fact:
        """The fact `name` about a file, or a picture in a tar shard or a parquet file: what is known, while the file
        is as it was, else what `find` returns."""
        key, file = os.path.abspath(path), container_of(path)
        stat = _stat(file)
        known = self._known.get(key)
        if known is None or known[0] != stat:
            known = (stat, {})
        elif name in known[1]:
            return known[1][name]
        fact = find()
        if stat and time.time() - max(stat[1], stat[2]) / 1e9 > SETTLED:
            known[1][name] = fact
            self._known[key] = known
            self._changed = True
        return fact

    def following(self, name: str, key: str, find: Callable[[], Fact]) -> Fact:
        """What follows from `key` alone: what is known for it, else what `find` returns. One `key` is kept of each
        `name`, which is no path."""
        known = self._known.get(name)
        if known is None or known[0] != [key] or name not in known[1]:
            known = self._known[name] = ([key], {name: find()})
            self._changed = True
        return known[1][name]

    def clear(self) -> None:
        """Forgets all: 100,000 files take 90 MB."""
        self._known.clear()

    def save(self, path: Path) -> None:
        """Where there is something new, and the folder can be written to. Raises WriteError where the disk is full."""
        with contextlib.suppress(OSError):
            self._save(path)

    def _save(self, path: Path) -> None:
        if self._changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, durable=False) as partial, open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps([name, *about]) + "\n" for name, about in self._known.items())
            self._changed = False

    def __reduce__(self) -> tuple:
        return FileFacts, ()  # a process that loads pictures needs none of it


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return ()


def _stat(path: Path) -> Stat:
    """Size, times of change and inode; empty where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
