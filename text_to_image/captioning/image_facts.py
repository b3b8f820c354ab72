"""What can be measured of a picture to find bad ones: its size, blur and contrast, and hashes that find duplicates."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import is_animation, is_turned, open_image, read_image_size

TINY = 256  # pixels; a shorter side below this is enlarged twofold and more for Stable Diffusion 1.5
BLUR_SIDE = 512  # pixels, the longer side at which blur is measured, since it depends on the size
# By skimage's blur_effect, from 0 (sharp) to 1: photographs and flat-lay pictures on white have 0.2 to 0.5; blurred
# with a radius of 3 of 512 pixels they have 0.62 to 0.83, textures least.
BLURRED = 0.65
BLANK = 8  # levels of 255 between the darkest and the brightest pixel; below, there is nothing to see
DARK = 64  # levels of 255; no photograph is wholly darker, but 12 bits of a camera saved as 16 end at 16, 14 at 64
# Bits of a perceptual hash that differ: 36 and more between different pictures of one kind of garment, mostly 0 to 16
# after a picture was saved again, made smaller or a little brighter.
HASH_SIDE, NEAR_BITS = 16, 24
HASH_BITS = HASH_SIDE * HASH_SIDE
SAME_COLOUR = 16  # levels of 255 between mean colours; the perceptual hash sees no colour
BLOCK_ROWS = 256  # pictures that are compared with all others at once


@dataclass(frozen=True)
class ImageFacts:
    """What was measured of one picture; of one that cannot be read only `fault` says why."""

    name: str
    fault: str | None = None
    width: int = 0
    height: int = 0
    rotated_by_exif: bool = False
    animated: bool = False
    pixel_hash: bytes = b""
    perceptual_hash: bytes = b""
    mean_colour: tuple[float, ...] = ()  # red, green, blue
    blur: float = 0.0
    contrast: int = 255
    brightest: int = 255


def measure_image(path: Path, name: str) -> ImageFacts:
    """Decodes and measures one picture. Faults of the file are returned, not raised."""
    try:
        width, height = read_image_size(path)
        picture = open_image(path)
        turned, animated = is_turned(path), is_animation(path)
    except ValueError as error:
        return ImageFacts(name, fault=str(error))
    darkest, brightest, blur = _measure_levels_and_blur(picture, width, height)
    return ImageFacts(
        name=name,
        width=width,
        height=height,
        rotated_by_exif=turned,
        animated=animated,
        pixel_hash=_pixel_hash(picture),
        perceptual_hash=_perceptual_hash(picture),
        mean_colour=tuple(np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).mean((0, 1)).tolist()),
        blur=blur,
        contrast=brightest - darkest,
        brightest=brightest,
    )


def _pixel_hash(picture: Image.Image) -> bytes:
    digest = hashlib.sha256(repr(picture.size).encode())
    digest.update(picture.tobytes())
    return digest.digest()


def _perceptual_hash(picture: Image.Image) -> bytes:
    import imagehash

    return np.packbits(imagehash.phash(picture, hash_size=HASH_SIDE).hash).tobytes()


def _measure_levels_and_blur(picture: Image.Image, width: int, height: int) -> tuple[int, int, float]:
    """(darkest level, brightest level, blur from 0 to 1; 0 for tiny and blank pictures)."""
    from skimage.measure import blur_effect

    grey = picture.convert("L")
    grey.thumbnail((BLUR_SIDE, BLUR_SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey)
    darkest, brightest = int(pixels.min()), int(pixels.max())
    blur = blur_effect(pixels) if min(width, height) >= TINY and brightest > darkest else 0.0
    return darkest, brightest, float(blur)


def find_near_duplicates(images: Sequence[ImageFacts]) -> Iterator[tuple[ImageFacts, ImageFacts, int]]:
    """(picture, the earlier picture that is most similar, bits in which they differ) where these are few.

    Blocks of rows at once: 10,000 pictures make 50 million pairs.
    """
    if not images:
        return
    hashes = np.frombuffer(b"".join(image.perceptual_hash for image in images), dtype=np.uint64)
    hashes = hashes.reshape(len(images), -1)
    colours = np.array([image.mean_colour for image in images], dtype=np.float32).reshape(len(images), -1)
    for start in range(0, len(images), BLOCK_ROWS):
        nearest = _nearest_earlier(hashes, colours, start, min(start + BLOCK_ROWS, len(images)))
        yield from ((images[row], images[earlier], distance) for row, (distance, earlier) in nearest.items())


def _nearest_earlier(hashes: np.ndarray, colours: np.ndarray, start: int, end: int) -> dict[int, tuple[int, int]]:
    """picture → (distance, the earlier picture), for pictures `start` to `end` that have a near one before them."""
    distances = np.zeros((end - start, end), dtype=np.uint16)
    for word in range(hashes.shape[1]):
        distances += np.bitwise_count(hashes[start:end, None, word] ^ hashes[None, :end, word])
    rows, columns = np.nonzero(distances <= NEAR_BITS)
    earlier = columns < rows + start
    rows, columns = rows[earlier], columns[earlier]
    same_colour = np.abs(colours[rows + start] - colours[columns]).max(1, initial=0) <= SAME_COLOUR
    nearest: dict[int, tuple[int, int]] = {}
    for row, column in zip(rows[same_colour].tolist(), columns[same_colour].tolist(), strict=True):
        candidate = int(distances[row, column]), column
        nearest[start + row] = min(nearest.get(start + row, (NEAR_BITS + 1, 0)), candidate)
    return nearest
