"""A captioned folder → pictures of one size: checked before anything is trained, upright, on white, cropped least."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageOps

from caption_forms import caption_forms
from captions import CaptionRow, read_captions
from errors import UserError

PIXEL_LIMIT = 150_000_000  # refused above: a small file can unpack to all of the memory
EXIF_ORIENTATION, EXIF_TURNED = 274, (5, 6, 7, 8)


@dataclass(frozen=True)
class Picture:
    """A picture of the data set with its captions; width and height in pixels as it is looked at (EXIF applied)."""

    path: Path
    width: int
    height: int
    forms: tuple[tuple[str, ...], ...]  # groups of captions that are drawn equally often

    @property
    def captions(self) -> list[str]:
        return [caption for group in self.forms for caption in group]


def read_pictures(folder: Path, short_captions: bool) -> list[Picture]:
    """All pictures of a captioned folder. UserError lists every one that is truncated, no picture, too large."""
    pictures, faults = [], []
    for row in read_captions(folder):
        try:
            width, height = measure(row.path(folder))
        except ValueError as fault:
            faults.append(f"metadata.jsonl, line {row.line}: {row.file_name}: {fault}")
        else:
            pictures.append(Picture(row.path(folder), width, height, _forms(row, short_captions)))
    if faults:
        raise UserError("\n".join([f"{folder}: {len(faults)} pictures cannot be used", *faults]))
    return pictures


def _forms(row: CaptionRow, short_captions: bool) -> tuple[tuple[str, ...], ...]:
    if not short_captions:
        return (row.captions,)
    return tuple(group for caption in row.captions for group in caption_forms(caption))


def measure(path: Path) -> tuple[int, int]:
    """(width, height) as looked at. Decodes the picture, so that a truncated one is found now and not in mid-run.

    Raises ValueError that says what is wrong with it.
    """
    try:
        with _no_bomb_warning(), Image.open(path) as image:
            width, height = image.size
            if width * height > PIXEL_LIMIT:
                raise ValueError(f"{width} x {height} pixels, more than the limit of {PIXEL_LIMIT:,}")
            turned = image.getexif().get(EXIF_ORIENTATION) in EXIF_TURNED
            image.draft("RGB", (width // 8, height // 8))  # a JPEG is decoded at an eighth: six times faster
            image.load()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more pixels than the limit of {PIXEL_LIMIT:,}") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except (OSError, SyntaxError, EOFError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise ValueError(f"damaged ({error})") from None
    return (height, width) if turned else (width, height)


def hash_pictures(pictures: Sequence[Picture]) -> str:
    """A hash of all that the data set teaches: the pictures' bytes and their captions, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(hashlib.sha256(picture.path.read_bytes()).digest())
        digest.update(repr(picture.forms).encode())
    return digest.hexdigest()


def training_size(pictures: Sequence[Picture], resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels for all pictures: their median aspect ratio, an area near resolution², both sides
    multiples of `multiple`."""
    ratio = median(picture.height / picture.width for picture in pictures)
    # A strip narrower than one multiple is widened to it, and must not grow in length for that.
    height = min(max(resolution * math.sqrt(ratio), multiple), max(resolution**2 / multiple, multiple))
    heights, widths = _around(height, multiple), _around(resolution**2 / height, multiple)
    candidates = [(h, w) for h in heights for w in widths]

    def misfit(size: tuple[int, int]) -> float:
        # A fifth cropped would cost somebody's legs; a fifth fewer pixels cost nothing like it.
        return 4 * cropped(ratio, size) + abs(math.log(size[0] * size[1] / resolution**2))

    return min(candidates, key=misfit)


def _around(side: float, multiple: int) -> tuple[int, int]:
    lower = max(1, math.floor(side / multiple))
    return lower * multiple, (lower + 1) * multiple


def cropped(ratio: float, size: tuple[int, int]) -> float:
    """The fraction of a picture of aspect ratio height / width `ratio` that is cut off to fill `size`."""
    wanted = size[0] / size[1]
    return 1 - min(ratio / wanted, wanted / ratio)


def load_picture(path: Path, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1]: resized to cover the size and cut at the centre."""
    picture = ImageOps.fit(open_picture(path), (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB, upright by its EXIF orientation, transparency on white; for one that `measure` accepts."""
    with _no_bomb_warning(), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@contextmanager
def _no_bomb_warning() -> Iterator[None]:
    """Pillow warns of large pictures; the limit here is another, and refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
