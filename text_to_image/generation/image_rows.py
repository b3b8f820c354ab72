"""images.jsonl as it is read: a row for each generated picture, by the name of its file. Standard library only."""

import json
from pathlib import Path
from typing import Any

from runtime.errors import UserError, first_line

IMAGES_FILE, SHEET_FILE = "images.jsonl", "contact_sheet.jpg"


def read_image_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of images.jsonl by file name; UserError where it cannot be read."""
    try:
        # Not str.splitlines(), which would cut a prompt at U+2028.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return {row["file_name"]: row for row in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); move it away") from None
