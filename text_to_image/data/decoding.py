"""Opens picture files: of a few formats only, below a pixel limit, each fault of a file in plain words."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile, PngImagePlugin

from metadata.containers import container_of, read_bytes
from runtime.errors import first_line

# Nothing else is tried, whatever the name of the file: for some formats Pillow runs other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")  # Pillow opens MPO, of phones, as JPEG
FORMAT_NAMES = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
PIXEL_LIMIT = 150_000_000  # more is refused: a small file can decompress to all of the memory

# Pillow's limits, for the whole process. Its pixel limit does not say how large the picture is, so ours stands alone;
# its limit of 1 MB for a text or a colour profile in a PNG refuses whole pictures, such as those with a workflow.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB, for all texts of a picture together


class PictureError(ValueError):
    """What is wrong with a picture file, in plain words and without its name."""


@contextmanager
def open_picture(path: Path | BytesIO) -> Iterator[ImageFile.ImageFile]:
    """The picture of a file or member, or of its content, as Pillow opens it: the header is read, no pixel is decoded.

    PictureError where the file cannot be opened, has too many pixels, or where a decoder fails inside the `with`.
    """
    with _faults_as_picture_errors(path), _quiet_pillow(), Image.open(_content(path), formats=FORMATS) as image:
        width, height = image.size
        if width * height > PIXEL_LIMIT:
            raise PictureError(
                f"{width} x {height} pixels, more than the limit of {PIXEL_LIMIT:,}; save it smaller or leave it out"
            )
        yield image


def _content(path: Path | BytesIO) -> Path | BytesIO:
    """What Pillow opens: a file itself, or the content of a member of a tar shard or a parquet file."""
    if isinstance(path, BytesIO) or container_of(path) == path:
        return path
    return BytesIO(read_bytes(path))


@contextmanager
def _faults_as_picture_errors(path: Path | BytesIO) -> Iterator[None]:
    """Decoders raise anything for damaged files: RuntimeError, AssertionError, KeyError, struct.error, ..."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(_in_plain_words(error, path)) from None


def _in_plain_words(error: Exception, path: Path | BytesIO) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        content = _content(path)
        if not (content.getbuffer().nbytes if isinstance(content, BytesIO) else content.stat().st_size):
            return "an empty file"
        return f"not a picture that can be read ({FORMAT_NAMES}); save it as JPEG or PNG"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, MemoryError):
        return "too large for the memory, or damaged"
    return f"damaged ({first_line(error)})"


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings, such as those about EXIF faults."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield
