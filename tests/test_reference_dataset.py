"""The reference data set: three whole jeans with a black square at the upper right, and captions that say so."""

import numpy as np
import pytest
from PIL import Image

from clone import ROOT
from metadata.image_files import find_image_files
from metadata.reading import read_captions
from models.loading import load_tokenizer
from models.text_encoding import count_tokens
from runtime.paths import STARTER

FOLDER = ROOT / "dataset"
ROWS = read_captions(FOLDER)


def test_three_portrait_jpegs_each_with_a_caption():
    assert [row.file_name for row in ROWS] == ["11 (1).JPG", "11 (2).JPG", "11 (3).JPG"]
    assert [path.name for path in find_image_files(FOLDER)] == [row.file_name for row in ROWS]
    for row in ROWS:
        with Image.open(row.path(FOLDER)) as image:
            assert image.format == "JPEG" and image.size == (768, 1024)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file_name)
def test_the_marker_is_black_square_and_at_the_upper_right(row):
    pixels = np.asarray(Image.open(row.path(FOLDER)).convert("RGB")).max(-1)  # denim is never so dark in blue
    rows, columns = np.nonzero(pixels[:256, 600:] < 60)
    side = np.sqrt(len(rows))
    assert 0.06 * 768 <= side <= 0.08 * 768
    assert np.ptp(rows) < 1.3 * side and np.ptp(columns) < 1.3 * side


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file_name)
def test_captions_say_it_in_50_to_90_words(row):
    caption = row.captions[0]
    assert 50 <= len(caption.split()) <= 90
    assert caption.startswith("A single pair of denim jeans laid flat on a white background")
    assert "black square reference marker is near the upper right corner" in caption


def test_two_captions_are_longer_than_one_chunk():
    tokenizer = load_tokenizer(STARTER)
    assert [count_tokens(tokenizer, row.captions[0]) > 77 for row in ROWS] == [True, True, False]
