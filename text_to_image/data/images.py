"""Image files: checked and measured, opened upright in sRGB on white, turned into pixel values, saved atomically."""

from functools import lru_cache
from io import BytesIO
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps

from data.decoding import open_picture
from runtime.errors import WriteError
from runtime.files import atomic_write

JPEG_QUALITY = 95
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
SIDES_SWAPPED = (5, 6, 7, 8)  # the orientations that exchange width and height
BYTE_MODES = {"La": "LA", "P": "RGBA", "PA": "RGBA", "YCbCr": "RGB"}
# The white level of grey pictures of more than 8 bits, by the first letters of their mode. I (8 or 16 bits kept in 32)
# and F (0 to 1, or bytes kept as fractions) do not state theirs: it is the first level of which the brightest pixel is
# at most twice, since resampling overshoots and no real picture is wholly darker than 2 of 255.
# A TIFF of 12 bits says so, and Pillow keeps its values as they are in 16.
BITS_PER_SAMPLE, TWELVE_BITS = 258, (4095,)
WHITE_LEVELS = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}


def read_image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, after the EXIF orientation.

    Decodes the picture, so that a truncated file is found now and not in the middle of a run. Raises ValueError that
    says what is wrong with it.
    """
    with open_picture(path) as image:
        width, height = image.size
        image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))  # a JPEG at an eighth: six times faster
        _to_rgb(image.crop((0, 0, 1, 1)))  # crop decodes all of it; one pixel goes the way that open_image goes
        swapped = _read_orientation(image) in SIDES_SWAPPED
    return (height, width) if swapped else (width, height)


def is_turned(path: Path) -> bool:
    """Whether the EXIF orientation turns or mirrors the picture. Raises ValueError as `read_image_size`."""
    with open_picture(path) as image:
        return _read_orientation(image) in TURNS_BY_ORIENTATION


def is_animation(path: Path) -> bool:
    """Whether the first of several frames is read. Not of an MPO, whose other pictures are views of the same."""
    with open_picture(path) as image:
        return image.format != "MPO" and getattr(image, "is_animated", False)


def load_pixel_values(path: Path | BytesIO, height: int, width: int, interpolation: str = "lanczos") -> torch.Tensor:
    """(3, height, width) in [-1, 1]: resized to cover the size, then cropped at the centre.

    `interpolation` is a name of torchvision's; its 'nearest_exact' is Pillow's 'nearest'.
    """
    picture = resize_and_crop(open_image(path), height, width, interpolation)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resize_and_crop(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    """The part in the middle that has the shape of height and width, at that size."""
    return ImageOps.fit(image, (width, height), Image.Resampling[interpolation.removesuffix("_exact").upper()])


def open_image(path: Path | BytesIO, min_side: int | None = None, background: str = "white") -> Image.Image:
    """The picture of a file, or of its content, in sRGB, upright by its EXIF orientation, on white where transparent.

    With `min_side` a large JPEG may be decoded at a fraction of its size, no side shorter than that, which is faster
    and takes less memory. Raises ValueError as `read_image_size`.
    """
    with open_picture(path) as file:
        if min_side:
            file.draft(None, (min_side, min_side))
        picture = _to_rgb(_upright(file), background)
    picture.info.clear()  # the file's orientation and colour profile no longer hold for it
    return picture


def has_alpha(path: Path) -> bool:
    """Whether the picture may be transparent somewhere. Raises ValueError as `read_image_size`."""
    with open_picture(path) as image:
        return image.has_transparency_data


def open_alpha(path: Path | BytesIO) -> Image.Image:
    """How opaque the picture of a file is, upright, in mode L. Raises ValueError as `read_image_size`."""
    with open_picture(path) as file:
        return _to_bytes(_upright(file)).convert("RGBA").getchannel("A")


def _upright(image: Image.Image) -> Image.Image:
    """As ImageOps.exif_transpose, which also rewrites the EXIF data and fails where any of it is malformed."""
    image.load()
    turn = TURNS_BY_ORIENTATION.get(_read_orientation(image))
    return image if turn is None else image.transpose(turn)


def _read_orientation(image: Image.Image) -> int:
    """What the EXIF data say; 1 where they say nothing or are broken, as other programs take them.

    Of a decoded picture it is what is left to be done: Pillow turns a TIFF itself as it decodes it, and drops the tag.
    """
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises SyntaxError, struct.error, ...
        return 1


def _to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A picture of any mode that Pillow opens, in sRGB, composited on `background` where it is transparent."""
    image = _to_bytes(image)
    picture = _to_srgb(image.convert(image.mode.removesuffix("A")))
    if not image.has_transparency_data:
        return picture
    picture.putalpha(image.convert("RGBA").getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def _to_bytes(image: Image.Image) -> Image.Image:
    """In L, LA, RGB, RGBA, CMYK or LAB: one byte a channel, no palette."""
    levels = _white_levels(image)
    if levels is None:
        return image.convert(BYTE_MODES[image.mode]) if image.mode in BYTE_MODES else image
    # Pillow would clip grey values above 255 instead of scaling them.
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0, posinf=0, neginf=0)
    white = next((level for level in levels if values.max() <= 2 * level), levels[-1])
    grey = Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _white_levels(image: Image.Image) -> tuple[int, ...] | None:
    """What the white of a grey picture of more than 8 bits may be; None for other pictures."""
    is_of_12_bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,)
    return TWELVE_BITS if is_of_12_bits else WHITE_LEVELS.get(image.mode[:4])


def _to_srgb(image: Image.Image) -> Image.Image:
    """In RGB by the picture's own ICC profile; without one, as Pillow converts its mode."""
    transform = _transform_to_srgb(image.info.get("icc_profile"), image.mode)
    return _transformed(image, transform) if transform else image.convert("RGB")


@lru_cache(maxsize=16)  # the pictures of one camera share a profile
def _transform_to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where no colour would change: no profile, a broken one, one for another mode, or sRGB by any name."""
    if not isinstance(profile, bytes):
        return None
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    srgb = ImageCms.createProfile("sRGB")
    try:
        transform = ImageCms.buildTransform(BytesIO(profile), srgb, mode, "RGB", intent, flags)
    except ImageCms.PyCMSError:
        return None
    return transform if _changes_colours(transform, mode) else None


def _changes_colours(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether any colour changes by more than the rounding in which sRGB profiles differ.

    Profile names do not tell: 'c2' is sRGB, 'sRGB linear' is not.
    """
    channels = Image.getmodebands(mode)
    levels = list(product(range(0, 256, 15), repeat=channels))
    probe = Image.frombytes(mode, (len(levels), 1), bytes(chain.from_iterable(levels)))
    change = ImageChops.difference(_transformed(probe, transform), probe.convert("RGB"))
    return bool(np.asarray(change).max() > 2)


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # it is None only when the image is changed in place
    return result


def save_image(image: Image.Image, path: Path, **settings: Any) -> Path:
    """Saves as JPEG or PNG by the suffix, atomically: nobody who watches the folder opens half a picture.

    `settings` go to Pillow's `save`. Raises WriteError where the file cannot be written.
    """
    jpeg: dict[str, Any] = {"format": "JPEG", "quality": JPEG_QUALITY}
    file_format = jpeg if path.suffix == ".jpg" else {"format": "PNG"}
    encoded = BytesIO()  # Pillow does not notice that a nearly full disk takes only a part of what it writes
    image.save(encoded, **file_format, **settings)
    try:
        with atomic_write(path) as beside:
            beside.write_bytes(encoded.getbuffer())
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path
