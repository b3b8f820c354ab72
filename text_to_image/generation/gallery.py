"""index.html of a folder of generated pictures: each with its prompt, seed and settings, made from images.jsonl."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from generation.image_rows import IMAGES_FILE, SHEET_FILE, read_image_rows
from reporting.pages import try_write_page
from runtime.errors import UserError, escape_control_chars

PAGE_FILE = "index.html"
NEAREST_FILE, THUMBNAILS = "copies.jsonl", ".nearest"  # what check_copies.py found, and thumbnails of what it names
MOST_PICTURES = 10_000  # on the page: a browser shows it within seconds
MOST_SUGGESTIONS = 500  # prompts that the filter suggests
NOT_SETTINGS = {"file_name", "prompt", "seed", "model_hash", "withheld"}  # of a row of images.jsonl
CHECKPOINT_PART = re.compile(r"/checkpoint-\d+/unet(?:_ema)?$")
FLAGS = {  # by the row's key, where the value is written as it is
    "steps": "--steps",
    "scheduler": "--scheduler",
    "guidance": "--guidance_scale",
    "guidance_rescale": "--guidance_rescale",
    "negative_prompt": "--negative_prompt",
    "height": "--height",
    "width": "--width",
    "dtype": "--dtype",
}
# What the page shows of a row, where the row lacks it:
SHOWN = {"prompt": "", "seed": None, "width": None, "height": None, "checkpoint": None, "withheld": False}
Row = dict[str, Any]


def try_write_gallery(folder: Path) -> None:
    """Writes index.html, or removes it where no picture is left. A page that cannot be made is a warning."""
    try:
        rows = present_rows(folder)
        nearest = read_nearest(folder)
    except UserError as error:
        print(escape_control_chars(f"warning: {folder / PAGE_FILE} is not written: {error}"), file=sys.stderr)
        return
    if rows:
        try_write_page(folder / PAGE_FILE, "gallery.html", **page_content(folder, rows, nearest))
    else:
        (folder / PAGE_FILE).unlink(missing_ok=True)


def present_rows(folder: Path) -> list[Row]:
    """The rows of images.jsonl whose picture is there: the newest prompt first, each one's pictures in their order."""
    names = {entry.name for entry in os.scandir(folder)}
    groups: dict[str, list[Row]] = {}
    for row in reversed(list(read_image_rows(folder / IMAGES_FILE).values())):
        if row["file_name"] in names:
            groups.setdefault(json.dumps([row.get("prompt"), settings_of(row)]), []).append(row)
    return [row for group in groups.values() for row in reversed(group)]


def read_nearest(folder: Path) -> dict[str, Row]:
    """{picture: its row of copies.jsonl}; `thumbnail` is None where that file is gone."""
    rows = read_image_rows(folder / NEAREST_FILE)
    for row in rows.values():
        thumbnail = row.get("thumbnail")
        row["thumbnail"] = thumbnail if thumbnail and (folder / thumbnail).is_file() else None
    return rows


def settings_of(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in NOT_SETTINGS}


def page_content(folder: Path, rows: Sequence[Row], nearest: Mapping[str, Row]) -> dict[str, Any]:
    """What the template gallery.html shows."""
    shown = rows[:MOST_PICTURES]
    settings: dict[str, int] = {}  # number of each, from 1
    pictures = []
    for row in shown:
        number = settings.setdefault(json.dumps(settings_of(row)), len(settings) + 1)
        added = {"settings": number, "nearest": nearest.get(row["file_name"])}
        pictures.append({**SHOWN, **row, **added})
    found = [picture["nearest"] for picture in pictures if picture["nearest"]]
    prompts = list(dict.fromkeys(picture["prompt"] for picture in pictures))
    return {
        "pictures": pictures,
        "total": len(rows),
        "prompts": len(prompts),
        "suggestions": prompts[:MOST_SUGGESTIONS] if len(prompts) > 1 else [],
        "settings": [describe_settings(json.loads(text), number) for text, number in settings.items()],
        "checked": len(found),
        "copies": sum(bool(row.get("copy")) for row in found),
        "sheet": SHEET_FILE if (folder / SHEET_FILE).is_file() else None,
        "folder": folder.resolve().name,
    }


def describe_settings(settings: Row, number: int) -> Row:
    facts = [(key.replace("_", " "), value) for key, value in settings.items() if value not in (None, "", False)]
    return {"number": number, "facts": facts, "command": command_of(settings)}


def command_of(settings: Row) -> str:
    """The call of inference.py with these settings, without prompt and seed; the model as images.jsonl names it."""
    model, *loras = str(settings.get("model", "")).split(" + ")
    checkpoint = settings.get("checkpoint") or ""
    words = ["python", "text_to_image/inference.py", "--model", CHECKPOINT_PART.sub("", model)]
    if checkpoint.startswith("checkpoint-"):
        words += ["--checkpoint", checkpoint]
    for position, (name, _, scale) in enumerate(lora.rpartition(" at ") for lora in loras):
        own = position == 0 and checkpoint  # the run's own LoRA comes with --model
        words += [] if own else ["--lora", name]
        words += ["--lora_scale", scale] if not own or scale != "1" or len(loras) > 1 else []
    for key, flag in FLAGS.items():
        if (value := settings.get(key)) not in (None, "", 0):
            text = f"{value:.10g}" if isinstance(value, float) else str(value)
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)
