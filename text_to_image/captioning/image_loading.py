"""Opens pictures ahead of the captioner, no larger than it needs them, since those that wait are all in memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from data.images import open_image, read_image_size
from runtime.prefetching import PREFETCHED, prefetch

LONGEST_SIDE = 1536  # pixels; some captioners could use more


def open_ahead(paths: Iterable[Path], ahead: int = PREFETCHED) -> Iterator[tuple[Path, Image.Image | str]]:
    """(path, picture) in order, or (path, fault) where it cannot be captioned; `ahead` of them wait at a time."""
    return prefetch(_open, paths, ahead)


def find_fault(path: Path) -> str | None:
    """Why the picture cannot be captioned, in words; None where it can be."""
    try:
        os.fsencode(path).decode("utf-8")
        read_image_size(path)
    except UnicodeDecodeError:
        return "its name is not UTF-8, so no row can hold it; rename it"
    except ValueError as error:
        return str(error)
    return None


def _open(path: Path) -> Image.Image | str:
    if fault := find_fault(path):
        return fault
    picture = open_image(path, LONGEST_SIDE)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
