"""The metadata file of a folder of pictures while captions are written into it: kept rows, or replaced ones.

Whatever a run has written, a later one finds: captions are in the file batch by batch, and a replacement notes in a
hidden file beside it which pictures it has done.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

from data.image_files import (
    METADATA,
    find_image_files,
    find_nested_image_files,
    find_unsupported_files,
    no_pictures_message,
)
from data.metadata import LINK_ADVICE, ScannedRow, scan_rows
from data.metadata_writer import Captions, write_captions
from runtime.errors import UserError, WorkError
from runtime.files import atomic_write, write_text_atomically

WRITING_SHARE = 0.05  # of the time: a file of many rows takes long to be written anew for every batch


@dataclass(frozen=True)
class CaptionFile:
    """Where the captions of `image_dir` stand, and the names that its pictures have there."""

    path: Path
    image_dir: Path
    prefix: PurePosixPath  # from the folder that the names are relative to, to `image_dir`
    recursive: bool

    @property
    def root(self) -> Path:
        """The folder that the names are relative to."""
        return self.image_dir if self.prefix == PurePosixPath() else self.path.parent

    def pictures(self) -> list[Path]:
        return find_image_files(self.image_dir, self.recursive)

    def unread(self) -> list[Path]:
        return find_unsupported_files(self.image_dir, self.recursive)

    def in_sub_folders(self) -> list[Path]:
        """Pictures that only `recursive` would find."""
        return (
            []
            if self.recursive
            else [p for p in find_nested_image_files(self.image_dir) if p.parent != self.image_dir]
        )

    def name_of(self, picture: Path) -> str:
        return (self.prefix / picture.relative_to(self.image_dir).as_posix()).as_posix()

    def rows(self) -> list[ScannedRow]:
        return scan_rows(self.path, self.root)

    def without_row(self, rows: Iterable[ScannedRow], among: Iterable[Path] | None = None) -> list[Path]:
        """Those that no row names, of `among` or of all pictures."""
        named = {PurePosixPath(row.file_name) for row in rows}
        pictures = self.pictures() if among is None else among
        return [picture for picture in pictures if PurePosixPath(self.name_of(picture)) not in named]

    def complete(self) -> str | None:
        """Says that every picture has a row, and how many of the captions are empty; None where one has no row."""
        if self.without_row(rows := self.rows()):
            return None
        pictures = len(self.pictures())
        words = f"all {pictures} pictures in {self.image_dir} have a row"
        if not pictures:
            words = f"no pictures right in {self.image_dir}, and {len(rows)} rows of others"
        if not (empty := sum(row.caption_fault is not None for row in rows)):
            return words
        captions = "1 caption is" if empty == 1 else f"{empty} captions are"
        return f"{words}; {captions} empty: write it by hand, or remove the row and run this again"


def refuse_nothing(file: CaptionFile) -> None:
    """UserError where there is neither a picture nor a row."""
    if not file.pictures() and not file.rows():
        raise UserError(no_pictures_message(file.image_dir, file.recursive))


def refuse_links(file: CaptionFile) -> None:
    """UserError where a picture of a metadata.jsonl is a link out of the folder: training would refuse its row."""
    if file.path.name != METADATA:
        return
    root = file.root.resolve()
    if strays := [file.name_of(path) for path in file.pictures() if not path.resolve().is_relative_to(root)]:
        links = "1 picture is a link" if len(strays) == 1 else f"{len(strays)} pictures are links"
        raise UserError(
            f"{file.image_dir}: {links} out of the folder, which training refuses: {strays[0]}; {LINK_ADVICE}"
        )


def caption_file(image_dir: Path, output: Path | None, recursive: bool) -> CaptionFile:
    """metadata.jsonl in `image_dir`, or the file `output`. UserError where that is a folder.

    Names are relative to `image_dir`, but in a metadata.jsonl further up to where that is, as `datasets` reads it.
    """
    path = output or image_dir / METADATA
    if path.is_dir():
        raise UserError(f"--output {path}: a folder; name a file, such as {path / METADATA}")
    folder, above = image_dir.resolve(), path.parent.resolve()
    beside_or_above = path.name == METADATA and folder.is_relative_to(above)
    prefix = PurePosixPath(folder.relative_to(above).as_posix()) if beside_or_above else PurePosixPath()
    return CaptionFile(path, image_dir, prefix, recursive)


class KeptRows:
    """Writes captions of pictures that have no row; the rows that there are stay as they are.

    A picture has a caption, or a list of them. `written` is told those, by file_name, that have just come into the
    file. `add` waits with writing where that would take more than a twentieth of the time; leaving the `with` block
    writes what waits. What is written is written inside `undisturbed()`.
    """

    def __init__(
        self,
        file: CaptionFile,
        written: Callable[[Captions], object] = lambda captions: None,
        undisturbed: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.file, self.written, self.undisturbed = file, written, undisturbed
        self.backups: list[str] = []  # names of copies of the file
        self.waiting: dict[str, str | Sequence[str]] = {}
        self.due = 0.0

    def pending(self) -> list[Path]:
        return self.file.without_row(self.file.rows())

    def add(self, captions: Captions) -> None:
        self.waiting |= captions
        if time.perf_counter() >= self.due:
            self.write()

    def write(self) -> None:
        """Puts what waits into the file, on the disk; WorkError where it cannot be written."""
        if not self.waiting:
            return
        begun = time.perf_counter()
        with self.undisturbed():
            captions, self.waiting = self.waiting, {}
            self.written(self._put(captions))
        ended = time.perf_counter()
        self.due = ended + (ended - begun) * (1 / WRITING_SHARE - 1)

    def _put(self, captions: Captions) -> Captions:
        """Those that came into the file: not those of pictures that somebody has given a row meanwhile."""
        return write_captions(self.file.path, captions)

    def finish(self) -> None:
        """All that was pending has been tried."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.write()


class ReplacedRows(KeptRows):
    """Writes new captions for all pictures, in their rows' places where they have one.

    The file as it was is kept beside it, and so is one that was changed by hand on the way: `backups`. `settings` are
    what the captions follow from: a run with the same ones goes on where one was broken off, one with others begins
    anew.
    """

    def __init__(self, file: CaptionFile, *hooks: Callable, settings: Mapping[str, object] | None = None):
        super().__init__(file, *hooks)
        self.journal = file.path.with_name(f".{file.path.name}.replacing")
        self.settings = dict(settings or {})
        file.rows()  # refuses a file that cannot be read
        broken_off = self._broken_off()
        self.goes_on = broken_off is not None
        if not self.goes_on:
            self.journal.unlink(missing_ok=True)  # of other settings: it must not outlive the backup
        self.backups, self.done, self.left_as = broken_off or ([], [], None)
        self._keep_changes()
        self._note()

    def pending(self) -> list[Path]:
        without_row = set(self.file.without_row(self.file.rows()))
        done = set(self.done)
        return [
            picture
            for picture in self.file.pictures()
            if picture in without_row or self.file.name_of(picture) not in done
        ]

    def finish(self) -> None:
        self.journal.unlink(missing_ok=True)

    def _put(self, captions: Captions) -> Captions:
        self._keep_changes()
        write_captions(self.file.path, captions, replace=True)
        # After the file: one that is killed between makes a copy too many and writes the same captions again, and
        # leaves none out.
        self.done += captions
        self.left_as = self._fingerprint()
        self._note()
        return captions

    def _keep_changes(self) -> None:
        """Copies the file where it is not as this replacement has left it: at its begin, and after work by hand."""
        if (found := self._fingerprint()) == self.left_as:
            return
        self.left_as = found
        if found:
            self.backups.append(self._back_up())
            self._note()

    def _fingerprint(self) -> str | None:
        """Of the file's content; None where there is no file."""
        path = self.file.path
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def _note(self) -> None:
        noted = {"settings": self.settings, "backups": self.backups, "done": self.done, "left_as": self.left_as}
        try:
            write_text_atomically(self.journal, json.dumps(noted))
        except OSError as error:
            raise WorkError(f"cannot write {self.journal}: {error.strerror}") from None

    def _broken_off(self) -> tuple[list[str], list[str], str | None] | None:
        """(backups' names, file_names that are done, the file's fingerprint then) of a replacement with these settings
        that came to no end."""
        try:
            noted = json.loads(self.journal.read_text(encoding="utf-8"))
            found = noted["backups"], noted["done"], noted["left_as"]
            return found if noted["settings"] == self.settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _back_up(self) -> str:
        """Its name. It takes no earlier backup's place."""
        path = self.file.path
        numbered = (path.with_name(f"{path.name}.backup-{number}") for number in count(1))
        backup = next(name for name in numbered if not os.path.lexists(name))
        try:
            with atomic_write(backup) as beside:
                beside.write_bytes(path.read_bytes())
        except OSError as error:
            raise WorkError(f"cannot write {backup}: {error.strerror}") from None
        return backup.name


def remove_partial_caption_files(file: CaptionFile) -> None:
    """What a killed run has left half-written; only for the holder of the lock."""
    for one in {file.path, file.path.resolve()}:  # what is written through a link has the name of what it leads to
        folder, name = one.parent, one.name
        for path in folder.iterdir() if folder.is_dir() else ():
            ours = path.name.startswith((f".{name}.", f"..{name}.replacing.")) and path.name.endswith(".part")
            if ours and not path.name.startswith(f".{name}.lock"):
                path.unlink(missing_ok=True)
