"""What to generate: prompts of the command line, a text file, JSON Lines or a metadata.csv. Standard library only."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from generation.foreign_prompts import is_comment, is_picture_record, parse_foreign_line
from metadata.rows import read_rows
from models.samplers import SAMPLERS
from runtime.errors import UserError
from runtime.flags import non_negative_float, positive_int, seed_int, utf8_text, zero_to_one
from runtime.text_files import read_utf8


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and what its row in a prompts file sets for it. None: the flag's value."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None  # of the first picture
    steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    num_images: int | None = None
    height: int | None = None  # pixels
    width: int | None = None

    def merge_flags(self, flags: argparse.Namespace) -> argparse.Namespace:
        """The flags, with this request's own values in place of theirs."""
        own = {key: value for key in REQUEST_KEYS if (value := getattr(self, key)) is not None}
        return argparse.Namespace(**{**vars(flags), **own})


def scheduler_name(name: str) -> str:
    if name not in SAMPLERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SAMPLERS)}")
    return name


JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
OTHER_SUFFIXES = (".tsv", ".yaml", ".yml")  # whose lines are no prompts
PROMPT_KEYS = ("prompt", "text")
TEXT_KEYS = ("prompt", "negative_prompt", "scheduler")  # whose values are JSON strings; all others are numbers
# What a row may set besides its prompt. A value is checked as the flag of the same name is.
REQUEST_KEYS: dict[str, Callable[[str], str | int | float]] = {
    "negative_prompt": utf8_text,
    "seed": seed_int,
    "steps": positive_int,
    "scheduler": scheduler_name,
    "guidance_scale": non_negative_float,
    "guidance_rescale": zero_to_one,
    "num_images": positive_int,
    "height": positive_int,
    "width": positive_int,
}


class PromptsFile(NamedTuple):
    requests: list[GenerationRequest]
    notes: list[str]  # lines about what is in the file and not used


def read_requests(path: Path) -> PromptsFile:
    """The requests in a file: a prompt on each line, in a *.jsonl file a JSON object on each line, or a metadata.csv.

    A row with `file_name` comes from a data set's metadata, of which only the captions are read, or from an
    images.jsonl, where each row is one picture. A line of text may also be one of kohya's or AUTOMATIC1111's. Raises
    UserError that lists every bad line.
    """
    requests: list[GenerationRequest] = []
    faults, not_used, comments = [], [], 0
    parse_line = PARSERS.get(path.suffix.lower(), _parse_text)
    for number, line in _read_lines(path):
        try:
            found = parse_line(line)
            requests += found.requests
            not_used += [f"{option} (line {number})" for option in found.not_used]
            comments += found.is_comment
        except ValueError as fault:
            faults.append(f"line {number}: {fault}")
    if faults:
        raise UserError("\n  ".join([f"--prompts_file {path}:", *faults]))
    if not requests:
        raise UserError(
            f"--prompts_file {path}: no prompt in it; write one a line, without # before it, or JSON Lines in a "
            "*.jsonl file"
        )
    notes = [f"{path}: not used: {', '.join(not_used)}"] if not_used else []
    notes += [f"{path}: lines left out as comments, which begin with #: {comments}"] if comments else []
    return PromptsFile(requests, notes)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(its number, what the file's parser takes) of each line that is not blank."""
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise UserError(
            f"--prompts_file {path}: {path.suffix} files are not read; write one prompt a line into a .txt file, or "
            'rows like {"prompt": "denim jeans", "seed": 7} into a .jsonl file'
        )
    try:
        if path.suffix.lower() == ".csv":
            yield from read_rows(path)
            return
        text = read_utf8(path)
    except UserError as error:
        raise UserError(f"--prompts_file {error}") from None
    if path.suffix.lower() in JSON_SUFFIXES and text.lstrip().startswith("["):
        raise UserError(
            f"--prompts_file {path}: one JSON array; a row must stand in each line: jq -c '.[]' FILE > prompts.jsonl"
        )
    # Not str.splitlines(), which would cut a prompt at U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip()


class ParsedLine(NamedTuple):
    requests: list[GenerationRequest]
    not_used: Sequence[str] = ()  # what stands in the line and is not honoured
    is_comment: bool = False


def _parse_text(line: str) -> ParsedLine:
    if is_comment(line):
        return ParsedLine([], is_comment=True)
    if line.lstrip().startswith('{"'):
        return _parse_json_line(line)  # JSON Lines in a file of another name
    if is_picture_record(line):
        raise ValueError(
            "AUTOMATIC1111's record of a picture; write a prompt and its settings in one line: "
            "denim jeans --n blurry --s 20 --l 7 --d 1"
        )
    if (found := parse_foreign_line(line.strip())) is None:
        return ParsedLine([GenerationRequest(line.strip())])
    settings = {key: _as_flag(key, value) for key, value in found.settings.items()}
    return ParsedLine([GenerationRequest(**settings)], found.not_used)


def _parse_json_line(line: str) -> ParsedLine:
    return _parse_row(_json_object(line))


def _parse_csv_row(row: dict[str, Any] | ValueError) -> ParsedLine:
    if isinstance(row, ValueError):
        raise row
    return _parse_row(row)


def _parse_row(row: dict[str, Any]) -> ParsedLine:
    """A request for each of the row's prompts. Raises ValueError that says what is wrong with the row."""
    prompts = _prompts_in(row)
    if "file_name" in row and "prompt" not in row:  # a data set's metadata
        return ParsedLine([GenerationRequest(prompt) for prompt in prompts])
    if "file_name" in row:  # images.jsonl, which has more keys and calls the guidance scale `guidance`
        row = {
            "num_images": 1,
            "guidance_scale": row.get("guidance"),
            **{key: value for key, value in row.items() if key in REQUEST_KEYS},
        }
    if unknown := set(row) - set(REQUEST_KEYS) - set(PROMPT_KEYS):
        known = ", ".join([*PROMPT_KEYS, *REQUEST_KEYS])
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are {known}")
    settings = {key: _checked(key, row[key]) for key in REQUEST_KEYS if row.get(key) is not None}
    return ParsedLine([GenerationRequest(prompt, **settings) for prompt in prompts])


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; a row looks like {"prompt": "denim jeans", "seed": 7}') from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


# By the ending of the file's name; of any other file each line is a prompt.
PARSERS: dict[str, Callable[[Any], ParsedLine]] = {
    **dict.fromkeys(JSON_SUFFIXES, _parse_json_line),
    ".csv": _parse_csv_row,
}


def _prompts_in(row: dict[str, Any]) -> list[str]:
    value = next((row[key] for key in PROMPT_KEYS if key in row), None)
    prompts = value if isinstance(value, list) else [value]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompt` (or `text`) must be a text")
    return [_checked("prompt", prompt) for prompt in prompts]


def _checked(key: str, value: Any) -> Any:
    is_text = key in TEXT_KEYS
    if isinstance(value, bool) or not isinstance(value, str if is_text else (int, float)):
        raise ValueError(f"`{key}`: {json.dumps(value)[:40]} is not what --{key} takes")
    return _as_flag(key, str(value))


def _as_flag(key: str, value: str) -> Any:
    """The value as the flag of that name has it. Raises ValueError."""
    try:
        return REQUEST_KEYS.get(key, utf8_text)(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"`{key}`: {error}") from None
