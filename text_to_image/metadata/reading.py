"""The captions of a folder of pictures: the rows of its metadata files, read and checked; metadata_writer writes them.

One JSON object a line, `{"file_name": "11 (1).JPG", "text": "..."}`; `text` may be a list of captions for the picture.
Needs only the standard library, so that a bad data set is refused before anything heavy is imported.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from metadata.files import MetadataFile, find_metadata_files, near_miss_message, unread_metadata_files
from metadata.image_files import METADATA, find_image_files, no_pictures_message
from metadata.picture_names import PictureNames
from metadata.repeats import REPEATS, repeats_fault, repeats_of
from metadata.row_masks import MASK, mask_and_fault, mask_of
from metadata.rows import file_name_of, found, read_rows, shown
from metadata.sidecars import Sidecars, distant_sidecars_message, find_differing_sidecars
from runtime.errors import UserError
from runtime.paths import SCRIPTS

# Keys under which other tools keep captions, the likeliest first.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "txt", "tags")

HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CaptionRow:
    """A row that passed every check: a picture inside the folder, at least one caption, the line number from 1."""

    file_name: str  # on disk, from the folder of the data set
    captions: tuple[str, ...]
    line: int
    repeats: float = 1.0  # how often a pass over the data set uses the picture
    mask: str | None = None  # on disk, from the folder of the data set

    def path(self, folder: Path) -> Path:
        return folder / self.file_name


@dataclass(frozen=True)
class ScannedRow:
    """A row as it stands, with the reasons for which training would refuse it; None where there is none."""

    file_name: str
    captions: tuple[str, ...]  # those that are not empty
    line: int
    picture_fault: str | None
    caption_fault: str | None
    is_empty: bool  # its caption is to be written yet
    other_column: str | None  # another key that holds its caption
    meant: str | None  # the picture that it probably means, where the one that it names is missing
    is_own: bool  # in the folder's own file, not in one of a sub-folder
    where: str  # the line, with the file where that is not the folder's own
    repeats_fault: str | None = None
    mask: str | None = None
    mask_fault: str | None = None


@dataclass(frozen=True)
class CaptionSources:
    """Where captions are from, and which files say something else; all empty for one metadata.jsonl in the folder."""

    elsewhere: Sequence[str] = ()  # metadata files that training was told to read
    sub_folders: Sequence[str] = ()  # with metadata files of their own
    not_read: Sequence[str] = ()  # metadata files, or folders with some
    differing: Sequence[str] = ()  # text files, from the row of their picture


RowCheck = Callable[[CaptionRow], None]  # raises ValueError where it refuses the row


def read_captions(
    folder: Path, column: str = "text", check: RowCheck | None = None, files: Sequence[MetadataFile] | None = None
) -> list[CaptionRow]:
    """The rows of the folder's metadata files (or of `files`) in order, captions under the key `column`.

    `check` is called with each row that is right so far. Raises UserError that lists every bad row, or says that there
    is no file, no row or no picture.
    """
    folder = Path(folder)
    files = find_metadata_files(folder) if files is None else files
    if not any(file.path.is_file() for file in files):
        raise UserError(_missing_metadata_message(folder, files))
    rows: list[CaptionRow] = []
    faults: list[str] = []
    seen = _SeenRows(folder)
    for file in files:
        for number, raw in read_rows(file.path):
            try:
                row = _checked_row(seen, file, number, raw, column)
                if row and check:
                    check(row)
                rows += [row] if row else []
            except ValueError as fault:
                faults.append(f"{file.where(number)}: {fault}")
    _refuse(files, faults)
    if not rows:
        raise UserError(f"{files[0].path} has no rows; {_how_to_add_rows(files[0])}")
    return rows


def scan_captions(folder: Path, column: str = "text", named: Path | None = None) -> list[ScannedRow]:
    """The rows of all metadata files of the folder, or of the file `named`, bad ones too, as `scan_rows` does."""
    return _scan(find_metadata_files(folder, named=named), Path(folder), column)


def scan_rows(path: Path, folder: Path, column: str = "text") -> list[ScannedRow]:
    """The rows of the metadata file `path` in file order, bad ones too; none where there is no file.

    File names are relative to `folder`. Raises UserError that lists the rows from which no file name can be read.
    """
    return _scan([MetadataFile(path, folder)] if path.exists() else [], folder, column)


def describe_captions(
    folder: Path,
    files: Sequence[MetadataFile],
    captions: Sequence[tuple[Path, Sequence[str]]],
    leave_out: Path | None = None,
) -> CaptionSources:
    """What to know of `captions`, the pictures and what their rows in `files` say.

    `leave_out` is a folder of other pictures, whose captions do not belong here.
    """
    there = [file.full_name(file.path.name) for file in find_metadata_files(folder, leave_out)]
    there += unread_metadata_files(folder, leave_out)
    read = {file.path.resolve() for file in files}
    return CaptionSources(
        elsewhere=[str(file.path) for file in files if not file.is_of_folder],
        sub_folders=[file.prefix.as_posix() for file in files if file.prefix.parts],
        not_read=[name for name in there if (folder / name).resolve() not in read],
        differing=[path.relative_to(folder).as_posix() for path in find_differing_sidecars(captions)],
    )


def other_caption_column(row: dict, column: str) -> str | None:
    """The key of a row without `column` that seems to hold its caption; None where no key does."""
    if column in row:
        return None
    texts = [key for key in row if key != "file_name" and _readable(row, key)]
    return next((key for key in CAPTION_COLUMNS if key in texts), texts[0] if len(texts) == 1 else None)


def lacks_caption(row: dict, column: str) -> bool:
    """Whether the caption of a row is still to be written: empty, null, or missing with no other key in its place."""
    text = row.get(column)
    blank = all(caption is None or caption == "" or str(caption).isspace() for caption in _as_list(text))
    return blank and other_caption_column(row, column) is None


class _SeenRows:
    """Which picture has which row, over all files; a picture has one row, or one that says the same in two files."""

    def __init__(self, folder: Path):
        self.names = PictureNames(folder)
        self._first: dict[str, tuple[MetadataFile, int, tuple[str, ...], dict[str, Any]]] = {}

    def is_repeated(self, name: str, row: dict, file: MetadataFile, line: int, column: str) -> bool:
        """Whether the row of another file says the same. Raises ValueError for a second row that is none of those."""
        captions = _readable(row, column)
        settings = {REPEATS: row.get(REPEATS), MASK: mask_and_fault(row, file, self.names)[0]}
        own = file, line, captions, settings
        first_file, first_line, first_captions, first_settings = self._first.setdefault(str(PurePosixPath(name)), own)
        if (first_file, first_line) == (file, line):
            return False
        if first_file == file:
            raise ValueError(f"{shown(name)} has a row already, line {first_line}; `{column}` may be a list")
        if first_captions != captions:
            raise ValueError(
                f"{shown(name)} has another caption in {first_file.where(first_line)}; remove one of the two rows"
            )
        if other := next((key for key in settings if settings[key] != first_settings[key]), None):
            raise ValueError(
                f"{shown(name)} has another `{other}` in {first_file.where(first_line)}; remove one of the two rows"
            )
        return True


def _checked_row(
    seen: _SeenRows, file: MetadataFile, line: int, raw: dict | ValueError, column: str
) -> CaptionRow | None:
    """None for a row that another file has, too."""
    if isinstance(raw, ValueError):
        raise raw
    name = seen.names.find(file.full_name(file_name_of(raw)))
    captions, repeats, mask = captions_of(raw, column), repeats_of(raw), mask_of(raw, file, seen.names)
    return None if seen.is_repeated(name, raw, file, line, column) else CaptionRow(name, captions, line, repeats, mask)


def _scan(files: Sequence[MetadataFile], folder: Path, column: str) -> list[ScannedRow]:
    rows: list[ScannedRow] = []
    faults: list[str] = []
    seen = _SeenRows(folder)
    for file in files:
        for number, raw in read_rows(file.path):
            try:
                rows += _scanned_row(seen, file, number, raw, column)
            except ValueError as fault:
                faults.append(f"{file.where(number)}: {fault}")
    _refuse(files, faults)
    return rows


def _scanned_row(
    seen: _SeenRows, file: MetadataFile, line: int, raw: dict | ValueError, column: str
) -> list[ScannedRow]:
    """The row in a list, which is empty for a row that another file has, too."""
    if isinstance(raw, ValueError):
        raise raw
    name = file.full_name(file_name_of(raw))
    picture_fault = meant = None
    try:
        name = seen.names.find(name)
    except ValueError as fault:
        picture_fault, meant = str(fault), getattr(fault, "probably", None)
    try:
        if seen.is_repeated(name, raw, file, line, column):
            return []
    except ValueError as fault:
        picture_fault = str(fault)
    mask, mask_fault = mask_and_fault(raw, file, seen.names)
    return [
        ScannedRow(
            file_name=name,
            captions=_readable(raw, column),
            line=line,
            picture_fault=picture_fault,
            caption_fault=_fault(raw, column),
            is_empty=lacks_caption(raw, column),
            other_column=other_caption_column(raw, column),
            meant=meant,
            is_own=not file.prefix.parts,
            where=file.where(line) if file.prefix.parts else f"line {line}",
            repeats_fault=repeats_fault(raw),
            mask=mask,
            mask_fault=mask_fault,
        )
    ]


def captions_of(row: dict, column: str) -> tuple[str, ...]:
    """Raises ValueError unless `column` is a caption or a list of captions, none of them empty."""
    text = row.get(column)
    captions: list[Any] = _as_list(text)
    if other := other_caption_column(row, column):
        raise ValueError(f"it has no `{column}`, but `{other}`; name that with --caption_column {other}")
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"`{column}` must be a caption or a list of captions, found {found(row, column)}")
    if not all(caption.strip() for caption in captions):
        raise ValueError(f"`{column}` is empty" if isinstance(text, str) else f"a caption in `{column}` is empty")
    if any(map(HALF_CHARACTER.search, captions)):
        raise ValueError(f"`{column}` holds half a character (a lone surrogate): {found(row, column)}")
    return tuple(captions)


def _as_list(text: object) -> list:
    return text if isinstance(text, list) else [text]


def _readable(row: dict, column: str) -> tuple[str, ...]:
    """The captions of a row that are not empty."""
    return tuple(caption for caption in _as_list(row.get(column)) if isinstance(caption, str) and caption.strip())


def _fault(row: dict, column: str) -> str | None:
    """Why training would refuse the captions of the row; None where it takes them."""
    try:
        captions_of(row, column)
    except ValueError as fault:
        return str(fault)
    return None


def _refuse(files: Sequence[MetadataFile], faults: Sequence[str]) -> None:
    if faults:
        count = "1 bad row" if len(faults) == 1 else f"{len(faults)} bad rows"
        place = files[0].path if len(files) == 1 else files[0].folder
        raise UserError("\n  ".join([f"{count} in {place}:", *faults]))


def _missing_metadata_message(folder: Path, files: Sequence[MetadataFile]) -> str:
    if files and files[0].path.is_dir():
        return f"--metadata_file {files[0].path}: a folder; name the file with the captions"
    if files:
        path = files[0].path
        if path.is_dir():
            return f"{path} is a folder, not a file with captions; name a file, or move the folder away"
        return f"--metadata_file {path}: no such file; {_how_to_caption(folder, files)}"
    pictures = find_image_files(folder)
    if near_miss := near_miss_message(folder):
        return near_miss
    if not pictures:
        return no_pictures_message(folder)
    if distant := distant_sidecars_message(folder, pictures):
        return distant
    sidecars = Sidecars()
    beside = sum(sidecars.read(path) is not None for path in pictures)
    texts = f" ({beside} of {len(pictures)} have a text file beside them, which becomes the caption)" if beside else ""
    return f"no {METADATA} in {folder}; {_how_to_caption(folder)}{texts}"


def _how_to_add_rows(file: MetadataFile) -> str:
    command = _how_to_caption(file.folder / file.prefix, [file])
    if file.path.suffix.lower() != ".csv":
        return command
    return f"write them there by hand, or {'move it away and ' if file.is_of_folder else ''}{command}"


def _how_to_caption(folder: Path, files: Sequence[MetadataFile] = ()) -> str:
    command = f'caption the pictures with: python "{SCRIPTS / "img_captioning.py"}" --image_dir "{folder}"'
    if elsewhere := next((file.path for file in files if not file.is_of_folder), None):
        if elsewhere.suffix.lower() == ".csv":  # which is read and never written
            elsewhere = elsewhere.with_suffix(".jsonl")
            return f'{command} --output "{elsewhere}", and train with --metadata_file "{elsewhere}"'
        return f'{command} --output "{elsewhere}"'
    if os.access(folder, os.W_OK):
        return command
    return f"{command} --output FILE (the folder cannot be written to), and train with --metadata_file FILE"
