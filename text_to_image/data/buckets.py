"""Aspect-ratio buckets: every picture is trained on nearly whole, in a size of its own shape, all of one area."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.augmentation import Augmentation
from data.dataset import Picture
from data.mirroring import mirror_caption

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Bucket:
    """Pictures that are trained on at one size."""

    size: Size
    pictures: int
    cropped: float  # the most that any of them loses, as a fraction of its area


@dataclass(frozen=True)
class ImageToEncode:
    """A picture to encode: in its size, in all its views, with all its captions."""

    picture: Picture
    size: Size
    augmentations: tuple[Augmentation, ...]
    interpolation: str

    @property
    def captions(self) -> list[str]:
        said = self.picture.captions
        mirrored = any(view.mirrored for view in self.augmentations)
        return said + [mirror_caption(caption) for caption in said] if mirrored else said


def choose_sizes(pictures: Sequence[Picture], resolution: int, multiple: int, square: bool) -> list[Size]:
    """The size of each picture; `square`: resolution x resolution for all, as diffusers' example crops them."""
    if square:
        side = max(1, resolution // multiple) * multiple
        return [(side, side)] * len(pictures)
    return [nearest_size(picture.height / picture.width, resolution, multiple) for picture in pictures]


def nearest_size(ratio: float, resolution: int, multiple: int) -> Size:
    """For pictures of height / width `ratio`: an area near resolution², both sides multiples of `multiple`."""
    # A strip narrower than one multiple is widened to it, and must not grow in length for that.
    height = min(max(resolution * math.sqrt(ratio), multiple), max(resolution**2 / multiple, multiple))
    heights, widths = _around(height, multiple), _around(resolution**2 / height, multiple)

    def misfit(size: Size) -> float:
        # A fifth cropped would cost somebody's legs; a fifth fewer pixels cost nothing like it.
        return 4 * cropped(ratio, size) + abs(math.log(size[0] * size[1] / resolution**2))

    return min(((h, w) for h in heights for w in widths), key=misfit)


def _around(side: float, multiple: int) -> Size:
    lower = max(1, math.floor(side / multiple))
    return lower * multiple, (lower + 1) * multiple


def cropped(ratio: float, size: Size) -> float:
    """The fraction of a picture of aspect ratio height / width `ratio` that is cut off to fill `size`."""
    wanted = size[0] / size[1]
    return 1 - min(ratio / wanted, wanted / ratio)


def list_buckets(pictures: Sequence[Picture], sizes: Sequence[Size]) -> list[Bucket]:
    """The buckets, the one with most pictures first."""
    counts = Counter(sizes)
    lost = dict.fromkeys(counts, 0.0)
    for picture, size in zip(pictures, sizes, strict=True):
        lost[size] = max(lost[size], cropped(picture.height / picture.width, size))
    return [Bucket(size, count, lost[size]) for size, count in counts.most_common()]
