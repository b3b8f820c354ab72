"""copies.jsonl: the nearest training picture of each generated one, for the page of the pictures."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.copies_report import NearestMatch
from generation.gallery import NEAREST_FILE, THUMBNAILS
from generation.image_rows import read_image_rows
from metadata.picture_names import distinct_names
from runtime.files import atomic_write, write_text_atomically

SIDE, QUALITY = 320, 85  # of a thumbnail, in px


def write_nearest(folder: Path, matches: Sequence[NearestMatch], training: Mapping[Path, Image.Image]) -> None:
    """A row for each match, after those of pictures that were checked before, and thumbnails of what they name."""
    path = folder / NEAREST_FILE
    rows = {name: row for name, row in read_image_rows(path).items() if (folder / name).is_file()}
    thumbnails = {nearest: _write_thumbnail(folder, training[nearest]) for nearest in {m.training for m in matches}}
    names = distinct_names(training)  # of several folders
    for match in matches:
        name = match.generated.name
        rows.pop(name, None)
        rows[name] = _to_row(match, names[match.training], thumbnails[match.training])
    write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    used = {row["thumbnail"] for row in rows.values()}
    for thumbnail in (folder / THUMBNAILS).glob("*.jpg"):
        if f"{THUMBNAILS}/{thumbnail.name}" not in used:
            thumbnail.unlink(missing_ok=True)


def _to_row(match: NearestMatch, nearest: str, thumbnail: str) -> dict[str, Any]:
    return {
        "file_name": match.generated.name,
        "nearest": nearest,
        "distance": round(match.distance, 6),
        "copy": match.is_copy,
        "thumbnail": thumbnail,
    }


def _write_thumbnail(folder: Path, picture: Image.Image) -> str:
    """Its name from `folder`. Named by its content, so that the same picture is there once."""
    small, encoded = picture.copy(), BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(encoded, "JPEG", quality=QUALITY)
    name = f"{THUMBNAILS}/{hashlib.sha256(encoded.getbuffer()).hexdigest()[:16]}.jpg"
    (folder / THUMBNAILS).mkdir(exist_ok=True)
    with atomic_write(folder / name, durable=False) as partial:
        partial.write_bytes(encoded.getbuffer())
    return name
