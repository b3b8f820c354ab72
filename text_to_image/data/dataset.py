"""A captioned folder → pictures: checked before anything is trained, upright, on white, in RGB."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.caption_variants import caption_variants
from data.images import read_image_size
from data.metadata import CaptionRow, read_captions


@dataclass(frozen=True)
class Picture:
    """A picture of the data set with its captions; width and height in pixels as it is looked at (EXIF applied)."""

    path: Path
    width: int
    height: int
    caption_groups: tuple[tuple[str, ...], ...]  # groups of captions that are drawn equally often

    @property
    def captions(self) -> list[str]:
        return [caption for group in self.caption_groups for caption in group]


def read_pictures(
    folder: Path, short_captions: bool, column: str = "text", trigger: str | None = None
) -> list[Picture]:
    """All pictures of a captioned folder. UserError lists every bad row, and every picture that cannot be read."""
    pictures = []

    def add(row: CaptionRow) -> None:
        try:
            width, height = read_image_size(row.path(folder))
        except ValueError as fault:
            raise ValueError(f"{row.file_name}: {fault}") from None
        pictures.append(Picture(row.path(folder), width, height, _forms(row, short_captions, trigger)))

    read_captions(folder, column, add)
    return pictures


def _forms(row: CaptionRow, short_captions: bool, trigger: str | None) -> tuple[tuple[str, ...], ...]:
    groups = [row.captions]
    if short_captions:
        own = [before_trigger(caption, trigger) for caption in row.captions]  # they may have it already
        groups = [group for caption in own for group in caption_variants(caption)]
    return tuple(tuple(with_trigger(caption, trigger) for caption in group) for group in groups)


def with_trigger(caption: str, trigger: str | None) -> str:
    """The phrase that calls the thing, then the caption; not twice."""
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}"


def before_trigger(caption: str, trigger: str | None) -> str:
    """The caption that `with_trigger` makes this one of."""
    return caption.removeprefix(f"{trigger}, ") if trigger else caption


def without_trigger(caption: str, trigger: str | None) -> str:
    """What is left to say to a model that does not know the phrase; a caption that is no more than it stays."""
    return re.sub(rf"^{re.escape(trigger)}(?!\w)[,.:;]?\s*", "", caption) or caption if trigger else caption


def hash_dataset(pictures: Sequence[Picture]) -> str:
    """A hash of all that the data set teaches: the pictures' bytes and their captions, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(hashlib.sha256(picture.path.read_bytes()).digest())
        digest.update(repr(picture.caption_groups).encode())
    return digest.hexdigest()
