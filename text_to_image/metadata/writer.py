"""Adds rows to a metadata file, or replaces captions in its rows, and changes no other byte of it."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from metadata.image_files import METADATA
from metadata.picture_names import same_name_key
from metadata.reading import lacks_caption
from metadata.rows import file_name_of, parse_row
from runtime.errors import WorkError
from runtime.files import atomic_write

Captions = Mapping[str, str | Sequence[str]]  # file_name → its caption or captions
Existing = Literal["keep", "fill", "replace"]  # rows that are there: untouched; captioned if empty; captioned anew


def append_captions(folder: Path, captions: Sequence[tuple[str, str]]) -> None:
    """Adds a row for each (file_name, caption) to `folder`/metadata.jsonl, as `write_captions` does."""
    write_captions(Path(folder) / METADATA, dict(captions))


def write_captions(
    path: Path, captions: Captions, existing: Existing = "keep", column: str = "text"
) -> dict[str, str | Sequence[str]]:
    """Adds a row for each picture that has none, and returns the captions that it wrote.

    With `existing` 'replace' the row of a picture that has one gets the new caption in its place, with 'fill' only a
    row whose caption is empty. All other bytes stay. The file is written atomically, so that it never ends in half a
    row, even if the process is killed. Raises WorkError where it cannot be written.
    """
    path = Path(path).resolve()  # replaces what a link leads to, and not the link
    try:
        content = path.read_bytes() if path.exists() else b""
        content, written, new = _replace_captions(content, captions, existing, column)
        if written:
            with atomic_write(path) as beside:
                beside.write_bytes(_append_rows(content, new, column))
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}") from None
    return written


def _append_rows(content: bytes, captions: Captions, column: str) -> bytes:
    line_end = b"\r\n" if re.search(rb"\r\n[^\n]*\Z", content) else b"\n"  # as the last line of the file has it
    if captions and content.removeprefix(BOM_UTF8) and not content.endswith(b"\n"):
        content += line_end
    rows = (json.dumps({"file_name": name, column: text}, ensure_ascii=False) for name, text in captions.items())
    return content + b"".join(row.encode("utf-8") + line_end for row in rows)


def _replace_captions(
    content: bytes, captions: Captions, existing: Existing, column: str
) -> tuple[bytes, dict[str, str | Sequence[str]], dict[str, str | Sequence[str]]]:
    """The content with the new captions in rows that exist; the captions to be written, and those without a row."""
    names = {_key(name): name for name in captions}
    lines, found, kept = content.split(b"\n"), set(), set()
    for index, line in enumerate(lines):
        try:
            row = parse_row(line.removeprefix(BOM_UTF8))
            name = names[_key(file_name_of(row))]
        except (ValueError, KeyError):
            continue  # a blank line, or another picture
        found.add(name)
        if existing == "replace" or existing == "fill" and lacks_caption(row, column):
            lines[index] = _replace_caption(line.decode("utf-8"), column, captions[name]).encode("utf-8")
        else:
            kept.add(name)
    written = {name: text for name, text in captions.items() if name not in kept}
    return b"\n".join(lines), written, {name: text for name, text in written.items() if name not in found}


def _key(name: str) -> PurePosixPath:
    return PurePosixPath(same_name_key(name))


def _replace_caption(row: str, column: str, caption: str | Sequence[str]) -> str:
    """The row, a JSON object as text, with `caption` as the value of `column` and every other character kept."""
    value = json.dumps(caption, ensure_ascii=False)
    span, end = _find_value(row, column)
    if span:
        return row[: span[0]] + value + row[span[1] :]
    comma = "" if row[:end].rstrip().endswith("{") else ", "
    return f"{row[:end]}{comma}{json.dumps(column)}: {value}{row[end:]}"


def _find_value(row: str, column: str) -> tuple[tuple[int, int] | None, int]:
    """(start and end of the value of `column`, or None without one; the index of the row's closing brace)."""
    decoder, here, span = json.JSONDecoder(), row.index("{") + 1, None
    while row[here := _skip_space(row, here)] != "}":
        key, here = decoder.raw_decode(row, _skip_space(row, here + (row[here] == ",")))
        start = _skip_space(row, _skip_space(row, here) + 1)  # behind the colon
        _, here = decoder.raw_decode(row, start)
        span = (start, here) if key == column else span  # the last of several counts, as in json.loads
    return span, here


def _skip_space(text: str, start: int) -> int:
    return start + len(text[start:]) - len(text[start:].lstrip())
