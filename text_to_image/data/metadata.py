"""metadata.jsonl, the captions of a folder of pictures: read and checked here, written by metadata_writer.

One JSON object a line, `{"file_name": "11 (1).JPG", "text": "..."}`; `text` may be a list of captions for the picture.
Needs only the standard library, so that a bad data set is refused before anything heavy is imported.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data.image_files import METADATA, find_image_files, no_pictures_message
from runtime.errors import UserError
from runtime.paths import SCRIPTS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINK_ADVICE = "copy the picture, or make a hard link to it (`cp -l`)"


@dataclass(frozen=True)
class CaptionRow:
    """A row that passed every check: a picture inside the folder, at least one caption, the line number from 1."""

    file_name: str
    captions: tuple[str, ...]
    line: int

    def path(self, folder: Path) -> Path:
        return Path(folder) / self.file_name


@dataclass(frozen=True)
class ScannedRow:
    """A row as it stands, with the reasons for which training would refuse it; None where there is none."""

    file_name: str
    captions: tuple[str, ...]  # those that are not empty
    line: int
    picture_fault: str | None
    caption_fault: str | None


RowCheck = Callable[[CaptionRow], None]  # raises ValueError where it refuses the row


def read_captions(
    folder: Path, column: str = "text", check: RowCheck | None = None, path: Path | None = None
) -> list[CaptionRow]:
    """The rows of `folder`/metadata.jsonl, or of the file `path`, in file order; captions under the key `column`.

    `check` is called with each row that is right so far. Raises UserError that lists every bad row, or says that there
    is no file, no row or no picture.
    """
    folder = Path(folder)
    if not (path or folder / METADATA).is_file():
        raise UserError(_missing_metadata_message(folder, path))
    rows = read_existing_captions(folder, column, check, path)
    if not rows:
        raise UserError(f"{path or folder / METADATA} has no rows; {_how_to_caption(folder, path)}")
    return rows


def read_existing_captions(
    folder: Path, column: str = "text", check: RowCheck | None = None, path: Path | None = None
) -> list[CaptionRow]:
    """As `read_captions`, but a missing or empty metadata.jsonl has no rows instead of being refused."""
    path = path or Path(folder) / METADATA
    if not path.exists():
        return []
    prefix = names_prefix(path, Path(folder))
    rows: list[CaptionRow] = []
    faults: list[str] = []
    first_lines: dict[PurePosixPath, int] = {}
    for number, raw in _numbered_lines(path):
        try:
            row = _checked_row(Path(folder), number, raw, column, prefix)
            first = first_lines.setdefault(PurePosixPath(row.file_name), number)
            if first != number:
                raise ValueError(_second_row_message(row.file_name, first))
            if check:
                check(row)
            rows.append(row)
        except ValueError as fault:
            faults.append(f"{path.name}, line {number}: {fault}")
    _refuse(path, faults)
    return rows


def names_prefix(path: Path, folder: Path) -> PurePosixPath:
    """What stands before the names of the pictures in `folder` in the metadata file `path`; usually nothing.

    In a metadata.jsonl further up names are relative to its own folder, as `datasets` reads them.
    """
    below, above = folder.resolve(), path.parent.resolve()
    is_above = path.name == METADATA and below.is_relative_to(above)
    return PurePosixPath(below.relative_to(above).as_posix()) if is_above else PurePosixPath()


def scan_rows(path: Path, folder: Path, column: str = "text") -> list[ScannedRow]:
    """The rows of the metadata file `path` in file order, bad ones too; none where there is no file.

    File names are relative to `folder`. Raises UserError that lists the rows from which no file name can be read.
    """
    rows: list[ScannedRow] = []
    faults: list[str] = []
    first_lines: dict[PurePosixPath, int] = {}
    for number, raw in _numbered_lines(path) if path.exists() else ():
        try:
            row = parse_row(raw)
            name = file_name_of(row)
        except ValueError as fault:
            faults.append(f"{path.name}, line {number}: {fault}")
            continue
        first = first_lines.setdefault(PurePosixPath(name), number)
        picture_fault = _fault(_check_picture, folder, name) if first == number else _second_row_message(name, first)
        rows.append(ScannedRow(name, _readable(row, column), number, picture_fault, _fault(_captions_of, row, column)))
    _refuse(path, faults)
    return rows


def parse_row(raw: bytes) -> dict:
    """The JSON object in one line of the file. Raises ValueError that says why there is none."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        raise ValueError("not JSON that can be read") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected {{"file_name": ..., "text": ...}}, found {_shown(row)}')
    return row


def file_name_of(row: dict) -> str:
    """Raises ValueError where the row names no file."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"`file_name` must be the name of a picture, found {_found(row, 'file_name')}")
    return name


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank, without the file's byte order mark."""
    try:
        content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if raw.strip():
            yield number, raw


def _checked_row(folder: Path, number: int, raw: bytes, column: str, prefix: PurePosixPath) -> CaptionRow:
    row = parse_row(raw)
    file_name = file_name_of(row)
    if prefix != PurePosixPath():
        if not PurePosixPath(file_name).is_relative_to(prefix):
            raise ValueError(f"{_shown(file_name)} is not in {folder}, whose names in this file begin with {prefix}/")
        file_name = PurePosixPath(file_name).relative_to(prefix).as_posix()
    _check_picture(folder, file_name)
    return CaptionRow(file_name, _captions_of(row, column), number)


def _check_picture(folder: Path, file_name: str) -> None:
    """Raises ValueError unless `file_name` is a file inside `folder` that is not empty."""
    if PurePosixPath(file_name).is_absolute() or ".." in PurePosixPath(file_name).parts:
        raise ValueError(f"`file_name` must stay inside the folder, found {_shown(file_name)}")
    path = folder / file_name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())  # a link may lead out of it, too
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a lone surrogate, links in a circle
        raise ValueError(f"`file_name` cannot be a file: {_shown(file_name)}") from None
    if not inside:
        raise ValueError(f"`file_name` is a link out of the folder: {_shown(file_name)}; {LINK_ADVICE}")
    if not size:
        raise ValueError(f"the picture {_shown(file_name)} is {'missing' if size is None else 'an empty file'}")


def _captions_of(row: dict, column: str) -> tuple[str, ...]:
    """Raises ValueError unless `column` is a caption or a list of captions, none of them empty."""
    text = row.get(column)
    captions: list[Any] = text if isinstance(text, list) else [text]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"`{column}` must be a caption or a list of captions, found {_found(row, column)}")
    if not all(caption.strip() for caption in captions):
        raise ValueError(f"`{column}` is empty" if isinstance(text, str) else f"a caption in `{column}` is empty")
    if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        raise ValueError(f"`{column}` holds half a character (a lone surrogate): {_found(row, column)}")
    return tuple(captions)


def _readable(row: dict, column: str) -> tuple[str, ...]:
    """The captions of a row that are not empty."""
    text = row.get(column)
    captions = text if isinstance(text, list) else [text]
    return tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())


def _fault(check: Callable[..., object], *arguments: object) -> str | None:
    """The message of the ValueError that `check` raises; None where it raises none."""
    try:
        check(*arguments)
    except ValueError as fault:
        return str(fault)
    return None


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        count = "1 bad row" if len(faults) == 1 else f"{len(faults)} bad rows"
        raise UserError("\n  ".join([f"{count} in {path}:", *faults]))


def _second_row_message(file_name: str, line: int) -> str:
    return f"{_shown(file_name)} has a row already, line {line}; `text` may be a list"


def _found(row: dict, key: str) -> str:
    return _shown(row[key]) if key in row else f"none (keys: {', '.join(map(_shown, row)) or 'none'})"


def _shown(value: object) -> str:
    """A value as shortened ASCII JSON: control characters in a data set must not reach the terminal."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _missing_metadata_message(folder: Path, path: Path | None) -> str:
    if path:
        return f"--metadata_file {path}: no such file; {_how_to_caption(folder, path)}"
    if find_image_files(folder):
        return f"no {METADATA} in {folder}; {_how_to_caption(folder, None)}"
    return no_pictures_message(folder)


def _how_to_caption(folder: Path, path: Path | None) -> str:
    command = f'caption the pictures with: python "{SCRIPTS / "img_captioning.py"}" --image_dir "{folder}"'
    if path:
        return f'{command} --output "{path}"'
    if os.access(folder, os.W_OK):
        return command
    return f"{command} --output FILE (the folder cannot be written to), and train with --metadata_file FILE"
