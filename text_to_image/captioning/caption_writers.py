"""Writes captions into the metadata file as they are made: for pictures without a row, or in place of old captions.

Whatever a run has written, the next one finds: captions go into the file batch by batch, and a replacement notes in a
hidden journal beside it which pictures are done.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Self

from captioning.caption_file import CaptionFile
from metadata.writer import Captions, Existing, write_captions
from runtime.errors import WorkError
from runtime.files import atomic_write, write_text_atomically

WRITING_SHARE = 0.05  # of the time, at most: each write rewrites the whole file, which takes long when it is large


class CaptionWriter(AbstractContextManager):
    """Adds rows for pictures that have none; the rows that exist stay as they are, unless 'fill' finds one empty.

    Captions wait in memory while writing them would take more than WRITING_SHARE of the time; leaving the `with` block
    writes the rest. Each write happens inside `uninterrupted()` and ends with `on_written(captions)`, which gets the
    captions that are in the file now.
    """

    def __init__(
        self,
        file: CaptionFile,
        on_written: Callable[[Captions], None] = lambda captions: None,
        uninterrupted: Callable[[], AbstractContextManager] = nullcontext,
        existing: Existing = "keep",
    ):
        self.file, self.on_written, self.uninterrupted, self.existing = file, on_written, uninterrupted, existing
        self.backups: list[str] = []  # names of copies of the file
        self.waiting: dict[str, str | Sequence[str]] = {}
        self.next_write = 0.0  # by time.perf_counter

    def pending(self) -> list[Path]:
        """The pictures that are to be captioned."""
        return self.file.pending(self.existing)

    def add(self, captions: Captions) -> None:
        self.waiting |= captions
        if time.perf_counter() >= self.next_write:
            self.write()

    def write(self) -> None:
        """Writes the captions that wait; WorkError where the file cannot be written."""
        if not self.waiting:
            return
        started = time.perf_counter()
        with self.uninterrupted():
            captions, self.waiting = self.waiting, {}
            self.on_written(self._put(captions))
        ended = time.perf_counter()
        self.next_write = ended + (ended - started) * (1 / WRITING_SHARE - 1)

    def _put(self, captions: Captions) -> Captions:
        """Returns the captions that are in the file now: a row that somebody else has added meanwhile stays."""
        return write_captions(self.file.path, captions, self.existing, self.file.column)

    def finish(self) -> None:
        """To be called once every pending picture has been tried."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


@dataclass
class ReplacementJournal:
    """How far a replacement has come."""

    backups: list[str] = field(default_factory=list)  # names of copies of the file
    done: list[str] = field(default_factory=list)  # file names of pictures with a new caption
    left_as: str | None = None  # hash of the metadata file as the replacement left it


class ReplacingCaptionWriter(CaptionWriter):
    """Writes new captions for all pictures, in the rows that they have or in new ones.

    The file is copied before the first caption is replaced, and again where it was changed by hand meanwhile:
    `backups`. `settings` are what the captions depend on. A run with the settings of an interrupted one resumes it;
    with others it starts over.
    """

    def __init__(
        self,
        file: CaptionFile,
        on_written: Callable[[Captions], None] = lambda captions: None,
        uninterrupted: Callable[[], AbstractContextManager] = nullcontext,
        settings: Mapping[str, object] | None = None,
    ):
        super().__init__(file, on_written, uninterrupted, "replace")
        self.journal_path = file.path.with_name(f".{file.path.name}.replacing")
        self.settings = dict(settings or {})
        file.rows()  # refuses a file that cannot be read
        journal = self._read_journal()
        self.resumed = journal is not None
        if not self.resumed:
            self.journal_path.unlink(missing_ok=True)  # of other settings: it must not outlive the backup below
        self.journal = journal or ReplacementJournal()
        self.backups = self.journal.backups  # the same list, so that the journal has every new one
        self._back_up_changes()
        self._write_journal()

    def pending(self) -> list[Path]:
        without_row = set(self.file.without_row(self.file.rows()))
        done = set(self.journal.done)
        return [
            picture
            for picture in self.file.pictures()
            if picture in without_row or self.file.name_of(picture) not in done
        ]

    def finish(self) -> None:
        self.journal_path.unlink(missing_ok=True)

    def _put(self, captions: Captions) -> Captions:
        self._back_up_changes()
        super()._put(captions)
        # The journal after the file: a run killed in between makes one backup too many and writes the same captions
        # again; the other way round it would leave some out.
        self.journal.done += captions
        self.journal.left_as = self._hash_file()
        self._write_journal()
        return captions

    def _back_up_changes(self) -> None:
        """Copies the file unless it is as this replacement left it: at the start, and after changes by hand."""
        if (found := self._hash_file()) == self.journal.left_as:
            return
        self.journal.left_as = found
        if found:
            self.backups.append(self._back_up())
            self._write_journal()

    def _hash_file(self) -> str | None:
        """Of the file's content; None where there is no file."""
        path = self.file.path
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def _write_journal(self) -> None:
        try:
            write_text_atomically(self.journal_path, json.dumps({"settings": self.settings, **asdict(self.journal)}))
        except OSError as error:
            raise WorkError(f"cannot write {self.journal_path}: {error.strerror}") from None

    def _read_journal(self) -> ReplacementJournal | None:
        """The journal of an interrupted replacement with the same settings; None where there is none."""
        try:
            content = json.loads(self.journal_path.read_text(encoding="utf-8"))
            journal = ReplacementJournal(content["backups"], content["done"], content["left_as"])
            return journal if content["settings"] == self.settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _back_up(self) -> str:
        """Copies the file under a new number and returns the copy's name."""
        path = self.file.path
        numbered = (path.with_name(f"{path.name}.backup-{number}") for number in count(1))
        backup = next(name for name in numbered if not os.path.lexists(name))
        try:
            with atomic_write(backup) as beside:
                beside.write_bytes(path.read_bytes())
        except OSError as error:
            raise WorkError(f"cannot write {backup}: {error.strerror}") from None
        return backup.name
