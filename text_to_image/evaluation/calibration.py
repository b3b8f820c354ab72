"""At what distance a picture counts as a copy: calibrated on each data set by copies that are made on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from evaluation.similarity import ImageSimilarity, background_colour, zoomed_on_background

# How much farther than a known copy a picture may be and still count as a copy. On rendered jeans known copies are
# 0.04 away, other copies up to 0.035, and the nearest of 160 other garments 0.12 (0.10 among thirty pairs of jeans).
KNOWN_COPY_MARGIN = 1.5


@dataclass(frozen=True)
class DistanceScale:
    """What distances mean on one data set. One entry for each training picture that was measured."""

    to_known_copies: np.ndarray  # (C,) distance of the farthest of its known copies
    to_nearest_other: np.ndarray  # (C,) distance of the nearest other training picture; empty for a single picture

    @property
    def limit(self) -> float:
        """A picture within this distance of a training picture is a copy.

        1.5 times the distance of known copies, but at most half of that between training pictures, and never less than
        the distance of known copies.
        """
        known = float(np.median(self.to_known_copies))
        limit = KNOWN_COPY_MARGIN * known
        if self.to_nearest_other.size:
            limit = max(known, min(limit, float(np.median(self.to_nearest_other)) / 2))
        return limit

    @property
    def is_inconclusive(self) -> bool:
        """Whether training pictures are as near to each other as copies are, so that distances say little."""
        if not self.to_nearest_other.size:
            return False
        return float(np.median(self.to_nearest_other)) <= 2 * float(np.median(self.to_known_copies))


def calibrate(
    similarity: ImageSimilarity,
    size: tuple[int, int],
    originals: Sequence[Image.Image],
    chosen: np.ndarray,
    distances: np.ndarray,
) -> DistanceScale:
    """Measures the distances of known copies, made at `size` (that of the generated pictures).

    `chosen` are the C indices of `originals` (N) to measure on, `distances` (C, N) theirs to all originals.
    """
    known = [similarity.distances(known_copies(originals[i], size), [originals[i]]).max() for i in chosen]
    others = distances.copy()
    others[np.arange(len(chosen)), chosen] = np.inf
    return DistanceScale(np.array(known), others.min(1) if len(originals) > 1 else np.array([]))


def known_copies(picture: Image.Image, size: tuple[int, int]) -> list[Image.Image]:
    """Roughly what a model that has memorised a picture generates: the picture, changed a little in four ways."""
    cropped = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    blurred = ImageOps.mirror(cropped).filter(ImageFilter.GaussianBlur(max(size) / 150))
    moved = Image.new("RGB", size, background_colour(cropped))
    moved.paste(_recoloured(cropped), (round(0.035 * size[0]), -round(0.02 * size[1])))
    lighter = ImageEnhance.Brightness(zoomed_on_background(cropped, 0.95)).enhance(1.1)
    rotated = cropped.rotate(1, Image.Resampling.BICUBIC, fillcolor=background_colour(cropped))
    return [blurred, moved, lighter, rotated]


def _recoloured(picture: Image.Image) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 100) % 256), saturation, value)).convert("RGB")
