"""The metadata file of a folder of pictures while captions are written into it: kept rows, or replaced ones.

Whatever a run has written, a later one finds: captions are in the file batch by batch, and a replacement notes in a
hidden file beside it which pictures it has done.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

from captions import METADATA, FoundRow, found_rows, image_files, write_captions
from errors import UserError, WorkError
from files import replace_text, replacing

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
        return image_files(self.image_dir, self.recursive)

    def name_of(self, picture: Path) -> str:
        return (self.prefix / picture.relative_to(self.image_dir).as_posix()).as_posix()

    def rows(self) -> list[FoundRow]:
        return found_rows(self.path, self.root)

    def without_row(self, rows: Iterable[FoundRow]) -> list[Path]:
        named = {PurePosixPath(row.file_name) for row in rows}
        return [picture for picture in self.pictures() if PurePosixPath(self.name_of(picture)) not in named]


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

    `written` is told the captions, by file_name, that have just come into the file. `add` waits with writing where
    that would take more than a twentieth of the time; leaving the `with` block writes what waits.
    """

    def __init__(self, file: CaptionFile, written: Callable[[Mapping[str, str]], object] = lambda captions: None):
        self.file, self.written = file, written
        self.waiting: dict[str, str] = {}
        self.due = 0.0

    def pending(self) -> list[Path]:
        return self.file.without_row(self.file.rows())

    def add(self, captions: Mapping[str, str]) -> None:
        self.waiting |= captions
        if time.perf_counter() >= self.due:
            self.write()

    def write(self) -> None:
        """Puts what waits into the file, on the disk; WorkError where it cannot be written."""
        begun, captions = time.perf_counter(), self.waiting
        self.waiting = {}
        if captions:
            self._put(captions)
            self.written(captions)
        ended = time.perf_counter()
        self.due = ended + (ended - begun) * (1 / WRITING_SHARE - 1)

    def _put(self, captions: Mapping[str, str]) -> None:
        write_captions(self.file.path, captions)

    def finish(self) -> None:
        """All that was pending has its caption."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.write()


class ReplacedRows(KeptRows):
    """Writes new captions for all pictures, in their rows' places where they have one.

    The file as it was is kept beside it, as `backup`. `settings` are what the captions follow from: a run with the
    same ones goes on where one was broken off, one with others begins anew.
    """

    def __init__(self, file: CaptionFile, written=lambda captions: None, settings: Mapping[str, object] | None = None):
        super().__init__(file, written)
        self.journal = file.path.with_name(f".{file.path.name}.replacing")
        self.settings = dict(settings or {})
        broken_off = self._broken_off()
        self.goes_on = broken_off is not None
        self.backup, self.done = broken_off or (self._back_up(), [])
        self._note()

    def pending(self) -> list[Path]:
        self.file.rows()  # refuses a file that cannot be read
        done = set(self.done)
        return [picture for picture in self.file.pictures() if self.file.name_of(picture) not in done]

    def finish(self) -> None:
        self.journal.unlink(missing_ok=True)

    def _put(self, captions: Mapping[str, str]) -> None:
        write_captions(self.file.path, captions, replace=True)
        # After the file: one that is killed between writes the same captions again, and leaves none out.
        self.done += captions
        self._note()

    def _note(self) -> None:
        noted = {"settings": self.settings, "backup": self.backup, "done": self.done}
        try:
            replace_text(self.journal, json.dumps(noted))
        except OSError as error:
            raise WorkError(f"cannot write {self.journal}: {error.strerror}") from None

    def _broken_off(self) -> tuple[str | None, list[str]] | None:
        """(backup's name, file_names that are done) of a replacement with these settings that came to no end."""
        try:
            noted = json.loads(self.journal.read_text(encoding="utf-8"))
            return (noted["backup"], noted["done"]) if noted["settings"] == self.settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _back_up(self) -> str | None:
        """Its name; None where there is nothing to keep. It takes no earlier backup's place."""
        path = self.file.path
        self.file.rows()  # refuses a file that cannot be read
        self.journal.unlink(missing_ok=True)  # of other settings: it must not outlive this backup
        if not path.exists():
            return None
        numbered = (path.with_name(f"{path.name}.backup-{number}") for number in count(1))
        backup = next(name for name in numbered if not os.path.lexists(name))
        try:
            with replacing(backup) as beside:
                beside.write_bytes(path.read_bytes())
        except OSError as error:
            raise WorkError(f"cannot write {backup}: {error.strerror}") from None
        return backup.name


def remove_litter(file: CaptionFile) -> None:
    """What a killed run has left half-written; only for the holder of the lock."""
    name = file.path.name
    for folder in {file.path.parent, file.path.resolve().parent}:
        for path in folder.iterdir() if folder.is_dir() else ():
            ours = path.name.startswith((f".{name}.", f"..{name}.replacing.")) and path.name.endswith(".part")
            if ours and not path.name.startswith(f".{name}.lock"):
                path.unlink(missing_ok=True)
