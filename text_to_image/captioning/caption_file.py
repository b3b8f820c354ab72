"""The metadata file that the captions of a folder of pictures are in, and which of the pictures have a row there."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.image_files import (
    METADATA,
    find_image_files,
    find_nested_image_files,
    find_unsupported_files,
    no_pictures_message,
)
from data.metadata import LINK_ADVICE, ScannedRow, names_prefix, scan_rows
from runtime.errors import UserError


@dataclass(frozen=True)
class CaptionFile:
    """Where the captions of `image_dir` are, and the names that its pictures have there."""

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

    def unsupported_files(self) -> list[Path]:
        return find_unsupported_files(self.image_dir, self.recursive)

    def nested_pictures(self) -> list[Path]:
        """The pictures in sub-folders that only --recursive captions."""
        if self.recursive:
            return []
        return [path for path in find_nested_image_files(self.image_dir) if path.parent != self.image_dir]

    def name_of(self, picture: Path) -> str:
        return (self.prefix / picture.relative_to(self.image_dir).as_posix()).as_posix()

    def rows(self) -> list[ScannedRow]:
        return scan_rows(self.path, self.root)

    def without_row(self, rows: Iterable[ScannedRow], among: Iterable[Path] | None = None) -> list[Path]:
        """The pictures that no row names, of `among` or of all."""
        named = {PurePosixPath(row.file_name) for row in rows}
        pictures = self.pictures() if among is None else among
        return [picture for picture in pictures if PurePosixPath(self.name_of(picture)) not in named]

    def advice_elsewhere(self) -> str:
        """What to do where the file cannot be written."""
        advice = "name another file with --output, and to training with --metadata_file"
        return f"{advice}; to keep the rows of this one, copy it there first" if self.path.exists() else advice

    def training_flags(self) -> str | None:
        """The flags with which training reads the file; None where it is in the folder, so that --dataset will do."""
        if self.path.resolve() == (self.image_dir / METADATA).resolve():
            return None
        return f"--dataset {shlex.quote(str(self.image_dir))} --metadata_file {shlex.quote(str(self.path))}"

    def completion_message(self) -> str | None:
        """Says that every picture has a row, and how many captions are empty; None where a picture has no row."""
        rows = self.rows()
        if self.without_row(rows):
            return None
        pictures = len(self.pictures())
        message = f"all {pictures} pictures in {self.image_dir} have a row"
        if not pictures:
            message = f"no pictures directly in {self.image_dir}, and {len(rows)} rows for other pictures"
        if not (empty := sum(row.caption_fault is not None for row in rows)):
            return message
        captions = "1 caption is" if empty == 1 else f"{empty} captions are"
        return f"{message}; {captions} empty: write it by hand, or remove the row and run this again"


def locate_caption_file(image_dir: Path, output: Path | None, recursive: bool) -> CaptionFile:
    """metadata.jsonl in `image_dir`, or the file `output`. UserError where that is a folder.

    Names are relative to `image_dir`; in a metadata.jsonl further up they are relative to its folder, as `datasets`
    reads them.
    """
    path = output or image_dir / METADATA
    if path.is_dir():
        raise UserError(f"--output {path}: a folder; name a file, such as {path / METADATA}")
    return CaptionFile(path, image_dir, names_prefix(path, image_dir), recursive)


def require_pictures_or_rows(file: CaptionFile) -> None:
    """UserError where the folder has no pictures and the file has no rows."""
    if not file.pictures() and not file.rows():
        raise UserError(no_pictures_message(file.image_dir, file.recursive))


def refuse_outside_links(file: CaptionFile) -> None:
    """UserError where a picture of a metadata.jsonl is a link out of the folder: training would refuse its row."""
    if file.path.name != METADATA:
        return
    root = file.root.resolve()
    if outside := [file.name_of(path) for path in file.pictures() if not path.resolve().is_relative_to(root)]:
        links = "1 picture is a link" if len(outside) == 1 else f"{len(outside)} pictures are links"
        raise UserError(
            f"{file.image_dir}: {links} out of the folder, which training refuses: {outside[0]}; {LINK_ADVICE}"
        )


def remove_partial_caption_files(file: CaptionFile) -> None:
    """Removes what a killed run left half-written. Only the holder of the lock may call it."""
    for path in {file.path, file.path.resolve()}:  # a file written through a link is beside what the link leads to
        prefixes, lock = (f".{path.name}.", f"..{path.name}.replacing."), f".{path.name}.lock"
        for beside in path.parent.iterdir() if path.parent.is_dir() else ():
            is_ours = beside.name.startswith(prefixes) and not beside.name.startswith(lock)
            if is_ours and beside.name.endswith(".part"):
                beside.unlink(missing_ok=True)
