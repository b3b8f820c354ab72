"""metadata.jsonl, the captions of a folder of pictures: read, checked and written here and nowhere else.

One JSON object a line, `{"file_name": "11 (1).JPG", "text": "..."}`; `text` may be a list of captions for the picture.
Only the standard library is needed, so that a bad data set is refused before anything heavy is imported.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import UserError, WorkError
from runtime.files import atomic_write
from runtime.paths import SCRIPTS

METADATA = "metadata.jsonl"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What our scripts write among pictures and is none of the data set's: sheets, and what a safety checker has blackened.
SHEETS = frozenset({"contact_sheet.jpg", "copies_sheet.jpg"})
WITHHELD_SUFFIX = "-withheld"
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Pictures of phones, cameras and the like that Pillow does not read by itself.
UNREAD_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".rw2"}
)
Captions = Mapping[str, str | Sequence[str]]  # by file_name
LINK_ADVICE = "copy the picture, or link it hard (`cp -l`)"


@dataclass(frozen=True)
class CaptionRow:
    """One checked row: a picture inside the data set's folder, its captions (at least one) and its line, from 1."""

    file_name: str
    captions: tuple[str, ...]
    line: int

    def path(self, folder: Path) -> Path:
        return Path(folder) / self.file_name


@dataclass(frozen=True)
class FoundRow:
    """One row as it stands, with what training would refuse it for: None where there is nothing."""

    file_name: str
    captions: tuple[str, ...]  # those with words in them
    line: int
    picture_fault: str | None
    caption_fault: str | None


def read_captions(
    folder: Path, column: str = "text", check: Callable[[CaptionRow], object] = lambda row: None
) -> list[CaptionRow]:
    """The rows of `folder`/metadata.jsonl in file order, captions under the key `column`.

    `check` may raise ValueError about a row. UserError lists every bad row, or says what is missing.
    """
    folder = Path(folder)
    if not (folder / METADATA).is_file():
        raise UserError(_what_is_missing(folder))
    rows = read_existing_captions(folder, column, check)
    if not rows:
        raise UserError(f"{folder / METADATA} has no rows; {_how_to_caption(folder)}")
    return rows


def read_existing_captions(
    folder: Path, column: str = "text", check: Callable[[CaptionRow], object] = lambda row: None
) -> list[CaptionRow]:
    """As `read_captions`, but a folder that has no metadata.jsonl yet, or an empty one, has no rows."""
    path = Path(folder) / METADATA
    if not path.exists():
        return []
    rows: list[CaptionRow] = []
    faults: list[str] = []
    first_lines: dict[PurePosixPath, int] = {}
    for number, raw in _lines(path):
        try:
            row = _checked_row(Path(folder), number, raw, column)
            first = first_lines.setdefault(PurePosixPath(row.file_name), number)
            if first != number:
                raise ValueError(_has_a_row(row.file_name, first))
            check(row)
            rows.append(row)
        except ValueError as fault:
            faults.append(f"{METADATA}, line {number}: {fault}")
    _refuse(path, faults)
    return rows


def scan_rows(path: Path, folder: Path, column: str = "text") -> list[FoundRow]:
    """The rows of the metadata file `path` in file order, none where there is no such file; names are from `folder`.

    A row may be of a picture that is gone or have no caption, but UserError lists those that no picture's name can be
    read from.
    """
    rows: list[FoundRow] = []
    faults: list[str] = []
    first_lines: dict[PurePosixPath, int] = {}
    for number, raw in _lines(path) if path.exists() else ():
        try:
            row = _json_object(raw)
            name = _file_name(row)
        except ValueError as fault:
            faults.append(f"{path.name}, line {number}: {fault}")
            continue
        texts = row.get(column) if isinstance(row.get(column), list) else [row.get(column)]
        captions = tuple(text for text in texts if isinstance(text, str) and text.strip())
        first = first_lines.setdefault(PurePosixPath(name), number)
        picture_fault = _fault_of(_check_picture, folder, name) if first == number else _has_a_row(name, first)
        rows.append(FoundRow(name, captions, number, picture_fault, _fault_of(_checked_captions, row, column)))
    _refuse(path, faults)
    return rows


def image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The pictures right in `folder`, '2.jpg' before '10.jpg'; hidden files are none. UserError without a folder.

    `recursive`: those in its sub-folders as well, but not in hidden ones or those with a metadata.jsonl of their own.
    """
    return _files(folder, recursive, _is_picture)


def unsupported_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Where `image_files` looks: pictures of kinds that cannot be read, but not a raw beside the JPEG made of it."""
    read = {path.with_suffix("") for path in image_files(folder, recursive)}
    return [path for path in _files(folder, recursive, _is_unread) if path.with_suffix("") not in read]


def image_files_below(folder: Path) -> list[Path]:
    """As `image_files` with `recursive`, but only those right in `folder` where one below cannot be read."""
    try:
        return image_files(folder, recursive=True)
    except OSError:
        return image_files(folder)


def _files(folder: Path, recursive: bool, wanted: Callable[[Path], bool]) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(_what_is_missing(folder))
    folders = _folders_below(folder) if recursive else [folder]
    found = [path for one in folders for path in one.iterdir() if wanted(path)]
    return sorted(found, key=lambda path: ([_natural(part) for part in path.relative_to(folder).parts], str(path)))


def append_captions(folder: Path, captions: Sequence[tuple[str, str]]) -> None:
    """Adds a row for each (file_name, caption) to `folder`/metadata.jsonl, as `write_captions` does."""
    write_captions(Path(folder) / METADATA, dict(captions))


def write_captions(path: Path, captions: Captions, replace: bool = False, column: str = "text") -> Captions:
    """Adds a row for each file_name: caption, or list of captions.

    What is in the file stays byte for byte, also when this is killed. A picture that has a row gets no second one;
    `replace`: its row gets the new caption in its place, and only its bytes change. Returns the captions that are in
    the file by it.
    The new file is written beside the old one and takes its name when it is on the disk: there is never half a row.
    Raises WorkError when it cannot be written.
    """
    path = Path(path).resolve()  # through a link, so that the link stays one
    try:
        content = path.read_bytes() if path.exists() else b""
        replaced, without_row = _replaced(content, captions, column)
        written = captions if replace else without_row
        if written:
            with atomic_write(path) as beside:
                beside.write_bytes(_appended(replaced if replace else content, without_row, column))
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}") from None
    return written


def _appended(content: bytes, captions: Captions, column: str) -> bytes:
    end = b"\r\n" if re.search(rb"\r\n[^\n]*\Z", content) else b"\n"  # as the last line that is ended
    if captions and content.removeprefix(BYTE_ORDER_MARK) and not content.endswith(b"\n"):
        content += end
    rows = (json.dumps({"file_name": name, column: text}, ensure_ascii=False) for name, text in captions.items())
    return content + b"".join(row.encode("utf-8") + end for row in rows)


def _replaced(content: bytes, captions: Captions, column: str) -> tuple[bytes, Captions]:
    """The file's content with the new captions in the rows that there are, and the captions without a row."""
    by_name = {PurePosixPath(name): text for name, text in captions.items()}
    lines, there = content.split(b"\n"), set()
    for number, line in enumerate(lines):
        try:
            name = PurePosixPath(_file_name(_json_object(line.removeprefix(BYTE_ORDER_MARK))))
        except ValueError:
            continue  # a blank line
        if name in by_name:
            lines[number] = _with_caption(line.decode("utf-8"), column, by_name[name]).encode("utf-8")
            there.add(name)
    without = {name: text for name, text in captions.items() if PurePosixPath(name) not in there}
    return b"\n".join(lines), without


def _with_caption(row: str, column: str, caption: str | Sequence[str]) -> str:
    """The row, a JSON object, with the caption as the value of its key `column`, and otherwise as it stands."""
    value, decoder, here = json.dumps(caption, ensure_ascii=False), json.JSONDecoder(), row.index("{") + 1
    span = None
    while row[here := _after_space(row, here)] != "}":
        key, here = decoder.raw_decode(row, _after_space(row, here + (row[here] == ",")))
        begin = _after_space(row, _after_space(row, here) + 1)  # behind the colon
        _, here = decoder.raw_decode(row, begin)
        span = (begin, here) if key == column else span  # of several the last counts, as in json.loads
    if span:
        return row[: span[0]] + value + row[span[1] :]
    comma = "" if row[:here].rstrip().endswith("{") else ", "
    return f"{row[:here]}{comma}{json.dumps(column)}: {value}{row[here:]}"


def _after_space(text: str, start: int) -> int:
    return start + len(text[start:]) - len(text[start:].lstrip())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank, without a byte order mark at the file's start."""
    try:
        content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if raw.strip():
            yield number, raw


def _checked_row(folder: Path, number: int, raw: bytes, column: str) -> CaptionRow:
    """The row in one line of the file; raises ValueError that says what is wrong with it."""
    row = _json_object(raw)
    file_name = _file_name(row)
    _check_picture(folder, file_name)
    return CaptionRow(file_name, _checked_captions(row, column), number)


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        count = "1 bad row" if len(faults) == 1 else f"{len(faults)} bad rows"
        raise UserError("\n  ".join([f"{count} in {path}:", *faults]))


def _has_a_row(file_name: str, line: int) -> str:
    return f"{_shown(file_name)} has a row already, line {line}; `text` may be a list"


def _fault_of(check: Callable, *arguments: object) -> str | None:
    """What the ValueError says that `check` raises, None where it raises none."""
    try:
        check(*arguments)
    except ValueError as fault:
        return str(fault)
    return None


def _json_object(raw: bytes) -> dict:
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


def _file_name(row: dict) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"`file_name` must be the name of a picture, found {_found(row, 'file_name')}")
    return name


def _check_picture(folder: Path, file_name: str) -> None:
    """Raises ValueError unless `file_name` is a file with something in it that lies inside `folder`."""
    if PurePosixPath(file_name).is_absolute() or ".." in PurePosixPath(file_name).parts:
        raise ValueError(f"`file_name` must stay inside the folder, found {_shown(file_name)}")
    path = folder / file_name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())  # a link may lead out as well
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a lone surrogate, links in a circle
        raise ValueError(f"`file_name` cannot be a file: {_shown(file_name)}") from None
    if not inside:
        raise ValueError(f"`file_name` is a link out of the folder: {_shown(file_name)}; {LINK_ADVICE}")
    if not size:
        raise ValueError(f"the picture {_shown(file_name)} is {'missing' if size is None else 'an empty file'}")


def _checked_captions(row: dict, column: str) -> tuple[str, ...]:
    text = row.get(column)
    captions = text if isinstance(text, list) else [text]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"`{column}` must be a caption or a list of captions, found {_found(row, column)}")
    if not all(caption.strip() for caption in captions):
        raise ValueError(f"`{column}` is empty" if isinstance(text, str) else f"a caption in `{column}` is empty")
    if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        raise ValueError(f"`{column}` holds half a character (a lone surrogate): {_found(row, column)}")
    return tuple(captions)


def _found(row: dict, key: str) -> str:
    return _shown(row[key]) if key in row else f"none (keys: {', '.join(map(_shown, row)) or 'none'})"


def _shown(value: object) -> str:
    """A value as ASCII JSON, cut: control characters in a data set must not reach the terminal."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _what_is_missing(folder: Path) -> str:
    if not folder.exists():
        return f"no data set folder {folder}; name a folder that holds pictures and {METADATA}"
    if not folder.is_dir():
        return f"{folder} is not a folder; name the folder that holds the pictures and {METADATA}"
    pictures = image_files(folder)
    return f"no {METADATA} in {folder}; {_how_to_caption(folder)}" if pictures else no_pictures_message(folder)


def no_pictures_message(folder: Path, recursive: bool = False) -> str:
    """Says so, and what lies there instead."""
    words = f"no pictures in {folder}"
    if unread := unsupported_files(folder, recursive):
        return f"{words} that can be read: {unread[0].name} is of a kind that is not; save it as JPEG or PNG"
    return words if recursive else f"{words}; img_captioning.py --recursive looks into its sub-folders as well"


def _how_to_caption(folder: Path) -> str:
    script = SCRIPTS / "img_captioning.py"
    return f'let the pictures be captioned with: python "{script}" --image_dir "{folder}"'


def _folders_below(folder: Path) -> list[Path]:
    """`folder` and all below it but hidden ones, links, and those that have captions of their own."""
    folders = []
    for name, below, files in os.walk(folder, onerror=_raise):
        own = Path(name) == folder or METADATA not in files
        folders += [Path(name)] if own else []
        below[:] = [one for one in below if own and not one.startswith(".")]
    return folders


def _raise(error: OSError) -> None:
    raise error


def _is_picture(path: Path) -> bool:
    if path.name in SHEETS or path.stem.endswith(WITHHELD_SUFFIX):
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_unread(path: Path) -> bool:
    return path.suffix.lower() in UNREAD_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key in which runs of digits count as numbers, before letters, and case does not matter."""
    runs = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(False, int(run), "") if run.isdecimal() else (True, 0, run) for run in runs]
