"""Small copies of pictures, as data URIs that stand in a page itself."""

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from data.images import open_image

THUMBNAIL_QUALITY = 82


def thumbnail(picture: Path | BytesIO, side: int, shape: tuple[int, int] | None = None) -> str:
    """A JPEG of at most `side` px each way as `data:image/jpeg;base64,…`, upright and in sRGB.

    With `shape` (height, width) it is first cropped at the centre to those proportions, as training crops it. Raises
    ValueError as `open_image`, OSError where the file is gone.
    """
    image = open_image(picture, min_side=side)
    if shape:
        scale = side / max(shape)
        size = max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    image.thumbnail((side, side))
    return to_data_uri(image)


def to_data_uri(image: Image.Image) -> str:
    """A picture in RGB as a JPEG inside a `data:` address."""
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getbuffer()).decode()}"
