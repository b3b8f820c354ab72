"""The sheet shows both pictures of each pair, frames copies in red, and stays small enough to be opened."""

from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.calibration import DistanceScale
from evaluation.copies_report import (
    COPY_COLOUR,
    MAX_PAIRS,
    CopyReport,
    Diversity,
    NearestMatch,
    make_copies_sheet,
)


def sheet(pairs: int, is_copy: bool) -> Image.Image:
    generated, training = Path("generated.png"), Path("training.png")
    matches = [NearestMatch(generated, training, 0.012, is_copy, "training.png")] * pairs
    report = CopyReport(
        matches, DistanceScale(np.array([0.04]), np.array([])), Diversity(None, 1, 1), Diversity(None, 1, 1)
    )
    pictures = Image.new("RGB", (75, 100), (10, 0, 0)), Image.new("RGB", (300, 400), (0, 20, 0))
    return make_copies_sheet(report, {generated: pictures[0]}, {training: pictures[1]})


def pixels_by_colour(image: Image.Image) -> dict:
    return {colour: count for count, colour in image.getcolors(1 << 24)}


def test_both_pictures_of_each_pair_are_on_it_at_one_size():
    found = pixels_by_colour(sheet(3, is_copy=False))
    assert found[10, 0, 0] == found[0, 20, 0] == 3 * 150 * 200


def test_a_copy_is_framed_and_others_are_not():
    assert pixels_by_colour(sheet(1, is_copy=True))[COPY_COLOUR] > 1000
    assert COPY_COLOUR not in pixels_by_colour(sheet(1, is_copy=False))


def test_of_many_pairs_the_first_are_shown():
    large = sheet(500, is_copy=False)
    assert pixels_by_colour(large)[10, 0, 0] == MAX_PAIRS * 150 * 200
    assert max(large.size) < 5000
