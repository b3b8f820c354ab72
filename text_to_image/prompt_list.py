"""What is asked for: prompts of the command line, of a text file, or of a JSON Lines file. Standard library only."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from flags import non_negative_float, positive_int, seed


@dataclass(frozen=True)
class Wish:
    """A prompt, and what its row in a file says of it; None: as the flags say."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    num_images: int | None = None
    height: int | None = None
    width: int | None = None


PROMPT_KEYS = ("prompt", "text")
# What else a row may say, and how it is checked: as the flag of the same name.
KEYS: dict[str, Callable[[str], object]] = {
    "negative_prompt": str,
    "seed": seed,
    "steps": positive_int,
    "guidance_scale": non_negative_float,
    "num_images": positive_int,
    "height": positive_int,
    "width": positive_int,
}


def read_wishes(path: Path) -> list[Wish]:
    """The wishes in a file: one prompt a line, or, where its name ends in .jsonl, a JSON object a line.

    A row with `file_name` is one of a data set's metadata.jsonl or of an images.jsonl, and may have keys of its own;
    elsewhere an unknown key is a misspelt one. UserError lists every bad line.
    """
    try:
        # Only \n ends a line: str.splitlines() would also cut a prompt at U+2028.
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--prompts_file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts_file {path}: not UTF-8; save it as UTF-8") from None
    read = _wish_of_row if path.suffix.lower() in (".jsonl", ".json", ".ndjson") else _wish_of_line
    wishes, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            wishes += read(line.strip()) if line.strip() else []
        except ValueError as fault:
            faults.append(f"line {number}: {fault}")
    if faults:
        raise UserError("\n  ".join([f"--prompts_file {path}:", *faults]))
    if not wishes:
        raise UserError(f"--prompts_file {path}: no prompt in it; one a line, or JSON Lines in a file *.jsonl")
    return wishes


def _wish_of_line(line: str) -> list[Wish]:
    return [Wish(line)]


def _wish_of_row(line: str) -> list[Wish]:
    """The row's wish, or one for each of its captions; raises ValueError that says what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; a row is like {"prompt": "denim jeans", "seed": 7}') from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    prompts = _prompts_of(row)
    unknown = set(row) - set(KEYS) - set(PROMPT_KEYS)
    if unknown and "file_name" not in row:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are prompt, text, {', '.join(KEYS)}")
    settings = {key: _checked(key, row[key]) for key in KEYS if row.get(key) is not None}
    if "guidance" in row and "file_name" in row:  # images.jsonl's name for it
        settings.setdefault("guidance_scale", _checked("guidance_scale", row["guidance"]))
    return [Wish(prompt, **settings) for prompt in prompts]


def _prompts_of(row: dict) -> list[str]:
    found = next((row[key] for key in PROMPT_KEYS if key in row), None)
    prompts = found if isinstance(found, list) else [found]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompt` (or `text`) must be a text")
    if any("\ud800" <= character <= "\udfff" for prompt in prompts for character in prompt):
        raise ValueError("the prompt holds half a character (a lone surrogate)")
    return prompts


def _checked(key: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str if key == "negative_prompt" else (int, float)):
        raise ValueError(f"`{key}`: {json.dumps(value)[:40]} is not what --{key} takes")
    try:
        return KEYS[key](value if key == "negative_prompt" else str(value))
    except Exception as error:  # argparse's own error class
        raise ValueError(f"`{key}`: {error}") from None
