"""Image files: measured, opened upright on white in sRGB, turned into pixel values, saved whole."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps

from runtime.errors import WorkError
from runtime.files import atomic_write

PIXEL_LIMIT = 150_000_000  # refused above: a small file can unpack to all of the memory


EXIF_ORIENTATION = 274


TURNS_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


SIDES_SWAPPED = (5, 6, 7, 8)


BYTE_MODES = {"La": "LA", "P": "RGBA", "PA": "RGBA", "YCbCr": "RGB"}


# What is white in grey pictures of more than 8 bits, by the first letters of their mode. A file does not say it of I
# (8 or 16 bits kept in 32) and F (0..1, or bytes kept as fractions): there it is the first that the brightest pixel
# does not exceed twofold, as resampling overshoots and a whole picture below 2 of 255 would be black.
WHITES = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}


def read_image_size(path: Path) -> tuple[int, int]:
    """(width, height) as looked at. Decodes the picture, so that a truncated one is found now and not in mid-run.

    Raises ValueError that says what is wrong with it.
    """
    try:
        with _quiet_pillow(), Image.open(path) as image:
            width, height = image.size
            if width * height > PIXEL_LIMIT:
                raise ValueError(f"{width} x {height} pixels, more than the limit of {PIXEL_LIMIT:,}")
            turned = image.getexif().get(EXIF_ORIENTATION) in SIDES_SWAPPED
            # A JPEG is decoded at an eighth: six times faster.
            image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            _in_rgb(image.crop((0, 0, 1, 1)))  # decodes all of it, and a pixel goes the way of open_picture
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more pixels than the limit of {PIXEL_LIMIT:,}") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except (OSError, SyntaxError, EOFError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise ValueError(f"damaged ({error})") from None
    return (height, width) if turned else (width, height)


def load_pixel_values(path: Path, height: int, width: int, interpolation: str = "lanczos") -> torch.Tensor:
    """(3, height, width) in [-1, 1]: resized to cover the size and cut at the centre.

    `interpolation` is a name of torchvision's; Pillow's 'nearest' is what torchvision calls nearest_exact.
    """
    resampling = Image.Resampling[interpolation.removesuffix("_exact").upper()]
    picture = ImageOps.fit(open_image(path), (width, height), resampling)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def open_image(path: Path, side: int | None = None) -> Image.Image:
    """The picture in sRGB, upright by its EXIF orientation, transparency on white; for one that `measure` accepts.

    Where `side` is given a large JPEG may be decoded at a fraction of its size, its sides no shorter than that:
    faster, and never whole in memory.
    """
    with _quiet_pillow(), Image.open(path) as file:
        if side:
            file.draft(None, (side, side))
        picture = _in_rgb(_upright(file))
    picture.info.clear()  # the orientation and the profile of the file are no longer those of the picture
    return picture


def _upright(image: Image.Image) -> Image.Image:
    """As ImageOps.exif_transpose, which also rewrites the EXIF data and fails where any of it is malformed."""
    turn = TURNS_BY_ORIENTATION.get(image.getexif().get(EXIF_ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _in_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode that Pillow opens: its colours in sRGB, laid on white where it is transparent."""
    image = _in_bytes(image)
    picture = _in_srgb(image.convert(image.mode.removesuffix("A")))
    if not image.has_transparency_data:
        return picture
    picture.putalpha(image.convert("RGBA").getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _in_bytes(image: Image.Image) -> Image.Image:
    """In L, LA, RGB, RGBA, CMYK or LAB: a byte a channel, no palette. Pillow would clip deep greys, not scale them."""
    whites = WHITES.get(image.mode[:4])
    if whites is None:
        return image.convert(BYTE_MODES[image.mode]) if image.mode in BYTE_MODES else image
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0, posinf=0, neginf=0)
    white = next((white for white in whites if values.max() <= 2 * white), whites[-1])
    grey = Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """In RGB by the ICC profile that came with the picture, or as Pillow converts its mode where there is none."""
    transform = _transform_to_srgb(image.info.get("icc_profile"), image.mode)
    return ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")


@lru_cache(maxsize=16)  # the pictures of a camera share a profile
def _transform_to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where no colour is to be changed: no profile, a broken one, one of another mode, sRGB by whatever name."""
    if not isinstance(profile, bytes):
        return None
    intent, black_to_black = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    srgb = ImageCms.createProfile("sRGB")
    try:
        transform = ImageCms.buildTransform(BytesIO(profile), srgb, mode, "RGB", intent, black_to_black)
    except ImageCms.PyCMSError:
        return None
    return transform if _changes_colours(transform, mode) else None


def _changes_colours(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """By more than the rounding in which sRGB profiles differ. Their names do not say it: 'c2' is sRGB, 'sRGB linear'
    is not."""
    channels = Image.getmodebands(mode)
    levels = list(product(range(0, 256, 15), repeat=channels))
    probe = Image.frombytes(mode, (len(levels), 1), bytes(chain.from_iterable(levels)))
    change = ImageChops.difference(ImageCms.applyTransform(probe, transform), probe.convert("RGB"))
    return max(largest for _, largest in change.getextrema()) > 2


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of large pictures, where the limit here is another and refuses, and of faults in EXIF data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield


JPEG_QUALITY = 95


def save_image(image: Image.Image, path: Path, **settings) -> Path:
    """Written beside and renamed: whoever watches the folder never opens half a picture."""
    kind = {"format": "JPEG", "quality": JPEG_QUALITY} if path.suffix == ".jpg" else {"format": "PNG"}
    try:
        with atomic_write(path) as beside:
            image.save(beside, **kind, **settings)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path
