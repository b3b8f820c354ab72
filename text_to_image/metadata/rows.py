"""The rows of a metadata file as they stand there: objects of a metadata.jsonl, or lines of a metadata.csv.

Needs only the standard library, so that a bad data set is refused before anything heavy is imported.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError, escape_control_chars
from runtime.text_files import read_file, read_utf8

NumberedRow = tuple[int, dict | ValueError]  # the line, from 1, and what stands there or why it is no row
# An array of rows, or an object over several lines, as `json.dump` and many tools write them.
ONE_JSON_VALUE = re.compile(rb"\s*(?:\[\s*(?:[{\[\]]|$)|\{\s*\n)")


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a .csv file, else of a file with a JSON object a line; blank lines are left out.

    Raises UserError where the whole file is something else.
    """
    return _csv_rows(path) if path.suffix.lower() == ".csv" else _jsonl_rows(path)


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
        raise ValueError(f'expected {{"file_name": ..., "text": ...}}, found {shown(row)}')
    return row


def file_name_of(row: dict) -> str:
    """Raises ValueError where the row names no file."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"`file_name` must be the name of a picture, found {found(row, 'file_name')}")
    return name


def found(row: dict, key: str) -> str:
    """The value of `key` for a message, or the keys that are there instead."""
    return shown(row[key]) if key in row else f"none (keys: {', '.join(map(shown, row)) or 'none'})"


def shown(value: object) -> str:
    """A value as it is written in JSON, shortened, without characters that a terminal would obey."""
    text = escape_control_chars(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else text[:77] + "..."


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    content = read_file(path)
    if ONE_JSON_VALUE.match(content):
        raise UserError(
            f"{path}: one JSON array or object over several lines; a metadata.jsonl has a row in each line: "
            f"jq -c 'if type == \"array\" then .[] else . end' FILE > metadata.jsonl"
        )
    # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield number, parse_row(raw)
        except ValueError as fault:
            yield number, fault


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    """As `datasets`' imagefolder reads them: separated by commas, names of the columns in the first line."""
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    header: list[str] = []
    end = 0
    try:
        for values in reader:
            start, end = end + 1, reader.line_num  # a value in quotes may go over several lines
            if not header:
                header = _csv_header(path, values)
            elif values:
                yield start, _csv_row(header, values)
    except csv.Error as error:
        raise UserError(f"{path.name}, line {end + 1}: not CSV: {error}; in {path}") from None


def _csv_header(path: Path, values: list[str]) -> list[str]:
    values = [value.strip() for value in values]
    if twice := [name for name, number in Counter(values).items() if number > 1]:
        raise UserError(f"{path}: its first line names the column {shown(twice[0])} twice")
    if "file_name" not in values:
        raise UserError(
            f"{path}: its first line must name the columns file_name and text, separated by commas; "
            f"found {shown(','.join(values))}"
        )
    return values


def _csv_row(header: list[str], values: list[str]) -> dict | ValueError:
    if len(values) > len(header):
        return ValueError(
            f"{len(values)} values for {len(header)} columns; a caption with commas stands in double quotes"
        )
    return dict(zip(header, values, strict=False))
