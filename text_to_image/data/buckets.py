"""Aspect-ratio buckets: each picture is trained nearly uncropped, at a size of its own shape and about one area."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.augmentation import Augmentation, augmented_caption
from data.dataset import Picture

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Bucket:
    """The pictures that are trained at one size."""

    size: Size
    pictures: int
    cropped: float  # the largest fraction of its area that any of them loses


@dataclass(frozen=True)
class ImageToEncode:
    """A picture to encode at its size, with all its augmentations and captions."""

    picture: Picture
    size: Size
    augmentations: tuple[Augmentation, ...]
    interpolation: str

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """What XL is told of size and crop, as `models.conditions.TimeIds`."""
        return (self.picture.height, self.picture.width, *crop_corner(self.picture, self.size), *self.size)

    @property
    def captions(self) -> list[str]:
        """Every caption that a sample of this picture may have: all as written, then all of the mirrored picture.

        Repeats stay: the order decides which texts are encoded in one batch, and so the last bits of the encodings.
        """
        sides = {augmentation.mirrored: augmentation for augmentation in self.augmentations}
        return [augmented_caption(caption, side) for side in sides.values() for caption in self.picture.captions]


def crop_corner(picture: Picture, size: Size) -> tuple[int, int]:
    """(top, left) in pixels of the centred crop that `images.load_pixel_values` takes of the resized picture."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    return round((picture.height * scale - height) / 2), round((picture.width * scale - width) / 2)


def choose_sizes(pictures: Sequence[Picture], resolution: int, multiple: int, square: bool) -> list[Size]:
    """The training size of each picture; `square`: the same square for all, as diffusers' example crops them."""
    if square:
        side = max(1, resolution // multiple) * multiple
        return [(side, side)] * len(pictures)
    return [nearest_size(picture.height / picture.width, resolution, multiple) for picture in pictures]


def nearest_size(ratio: float, resolution: int, multiple: int) -> Size:
    """The size for pictures of height / width `ratio`: about resolution² pixels, both sides multiples."""
    # A strip narrower than one multiple is widened to it, and must not grow longer for that.
    height = min(max(resolution * math.sqrt(ratio), multiple), max(resolution**2 / multiple, multiple))
    heights, widths = _multiples_around(height, multiple), _multiples_around(resolution**2 / height, multiple)

    def misfit(size: Size) -> float:
        # Cropping a fifth would cost somebody's legs; a fifth fewer pixels costs nothing like it.
        return 4 * cropped_fraction(ratio, size) + abs(math.log(size[0] * size[1] / resolution**2))

    return min(((h, w) for h in heights for w in widths), key=misfit)


def _multiples_around(side: float, multiple: int) -> tuple[int, int]:
    lower = max(1, math.floor(side / multiple))
    return lower * multiple, (lower + 1) * multiple


def cropped_fraction(ratio: float, size: Size) -> float:
    """The fraction of the area that a picture of height / width `ratio` loses when it is cropped to fill `size`."""
    target = size[0] / size[1]
    return 1 - min(ratio / target, target / ratio)


def list_buckets(pictures: Sequence[Picture], sizes: Sequence[Size]) -> list[Bucket]:
    """The buckets, the one with the most pictures first."""
    counts = Counter(sizes)
    cropped = dict.fromkeys(counts, 0.0)
    for picture, size in zip(pictures, sizes, strict=True):
        cropped[size] = max(cropped[size], cropped_fraction(picture.height / picture.width, size))
    return [Bucket(size, count, cropped[size]) for size, count in counts.most_common()]
