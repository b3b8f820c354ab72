"""What is asked for: prompts of the command line, of a text file, or of a JSON Lines file. Standard library only."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.samplers import SAMPLERS
from runtime.errors import UserError
from runtime.flags import non_negative_float, positive_int, seed_int, utf8_text, zero_to_one


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and what its row in a file says of it; None: as the flags say."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    num_images: int | None = None
    height: int | None = None
    width: int | None = None


def sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SAMPLERS)}")
    return name


PROMPT_KEYS = ("prompt", "text")
TEXTS = ("negative_prompt", "scheduler")
# What else a row may say, and how it is checked: as the flag of the same name.
KEYS: dict[str, Callable[[str], object]] = {
    "negative_prompt": utf8_text,
    "seed": seed_int,
    "steps": positive_int,
    "scheduler": sampler,
    "guidance_scale": non_negative_float,
    "guidance_rescale": zero_to_one,
    "num_images": positive_int,
    "height": positive_int,
    "width": positive_int,
}


def read_requests(path: Path) -> list[GenerationRequest]:
    """The wishes in a file: one prompt a line, or, where its name ends in .jsonl, a JSON object a line.

    A row with `file_name` is one of a data set's metadata.jsonl, of which the captions alone are read, or of an
    images.jsonl, of which each is one picture; elsewhere an unknown key is a misspelt one. UserError lists every bad
    line.
    """
    try:
        # Only \n ends a line: str.splitlines() would also cut a prompt at U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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


def _wish_of_line(line: str) -> list[GenerationRequest]:
    return [GenerationRequest(line)]


def _wish_of_row(line: str) -> list[GenerationRequest]:
    """The row's wish, or one for each of its captions; raises ValueError that says what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not JSON; a row is like {"prompt": "denim jeans", "seed": 7}') from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    prompts = _prompts_of(row)
    if "file_name" in row and "prompt" not in row:
        return [GenerationRequest(prompt) for prompt in prompts]
    if "file_name" in row:  # `guidance` is images.jsonl's name for it
        row = {"num_images": 1, "guidance_scale": row.get("guidance"), **{k: v for k, v in row.items() if k in KEYS}}
    if unknown := set(row) - set(KEYS) - set(PROMPT_KEYS):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known are prompt, text, {', '.join(KEYS)}")
    settings = {key: _checked(key, row[key]) for key in KEYS if row.get(key) is not None}
    return [GenerationRequest(prompt, **settings) for prompt in prompts]


def _prompts_of(row: dict) -> list[str]:
    found = next((row[key] for key in PROMPT_KEYS if key in row), None)
    prompts = found if isinstance(found, list) else [found]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompt` (or `text`) must be a text")
    return [_checked("prompt", prompt) for prompt in prompts]


def _checked(key: str, value: object) -> object:
    is_text = key in (*TEXTS, "prompt")
    if isinstance(value, bool) or not isinstance(value, str if is_text else (int, float)):
        raise ValueError(f"`{key}`: {json.dumps(value)[:40]} is not what --{key} takes")
    try:
        return KEYS.get(key, utf8_text)(value if is_text else str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"`{key}`: {error}") from None
