"""Buckets: each picture is trained at a size of its own shape, and little of it is cropped."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.augmentation import NO_AUGMENTATION, list_augmentations
from data.buckets import ImageToEncode, choose_sizes, cropped_fraction, list_buckets, nearest_size
from data.dataset import Picture
from data.images import load_pixel_values


def picture_of(width: int, height: int) -> Picture:
    return Picture(Path("x"), width, height, (("a",),))


@pytest.mark.parametrize(
    ("width", "height", "resolution", "multiple", "expected"),
    [
        (768, 1024, 256, 32, (288, 224)),
        (768, 1024, 512, 64, (576, 448)),
        (768, 1024, 256, 64, (256, 192)),
        (1024, 768, 256, 32, (224, 288)),
        (500, 500, 256, 32, (256, 256)),
        (500, 500, 256, 64, (256, 256)),
        (3000, 10, 64, 32, (32, 128)),
        (100, 200, 256, 32, (384, 192)),
    ],
)
def test_a_size_has_the_pictures_shape_and_the_area_asked_for(width, height, resolution, multiple, expected):
    size = nearest_size(height / width, resolution, multiple)
    assert size == expected
    assert not size[0] % multiple and not size[1] % multiple


@pytest.mark.parametrize("multiple", [8, 32, 64])
def test_whatever_the_shape_the_area_is_near_and_little_is_cropped(multiple):
    for width in range(400, 1601, 37):
        height, width_ = nearest_size(800 / width, 512, multiple)
        assert 0.75 < height * width_ / 512**2 < 1.3
        assert cropped_fraction(800 / width, (height, width_)) < 0.002 * multiple


def test_a_portrait_picture_loses_no_more_than_is_said():
    assert cropped_fraction(1024 / 768, (288, 224)) == pytest.approx(0.036, abs=0.001)
    assert cropped_fraction(1.0, (256, 256)) == 0


def test_pictures_of_other_shapes_go_into_other_buckets_the_fullest_first():
    pictures = [picture_of(300, 200), picture_of(768, 1024), picture_of(100, 100), picture_of(750, 1000)]
    sizes = choose_sizes(pictures, 256, 32, square=False)
    buckets = list_buckets(pictures, sizes)
    assert sizes[1] == sizes[3] == buckets[0].size and buckets[0].pictures == 2
    assert len(buckets) == 3 and sum(bucket.pictures for bucket in buckets) == 4
    assert buckets[0].cropped == pytest.approx(0.036, abs=0.001)


def test_all_are_cropped_to_a_square_where_that_is_asked_for():
    pictures = [picture_of(300, 200), picture_of(768, 1024)]
    assert choose_sizes(pictures, 256, 32, square=True) == [(256, 256)] * 2
    assert choose_sizes(pictures, 250, 64, square=True) == [(192, 192)] * 2
    assert list_buckets(pictures, [(256, 256)] * 2)[0].cropped == pytest.approx(1 / 3)


def test_the_captions_to_encode_are_all_as_written_then_all_mirrored_with_their_repeats():
    picture = Picture(Path("x"), 30, 40, (("on the left", "blue"), ("blue",)))
    as_written = ["on the left", "blue", "blue"]
    assert ImageToEncode(picture, (64, 64), list_augmentations(False, 0.1), "lanczos").captions == as_written
    mirrored = ["on the right", "blue", "blue"]
    assert ImageToEncode(picture, (64, 64), list_augmentations(True, 0.1), "lanczos").captions == as_written + mirrored


@pytest.mark.parametrize("square", [False, True], ids=["buckets", "squares"])
def test_the_crop_that_is_told_is_the_crop_that_is_read(square):
    """Red grows by a level a pixel to the right, green by one a pixel down: each pixel says where it lies."""
    random = np.random.default_rng(0)
    for width, height in random.integers(90, 255, (100, 2)).tolist():
        picture = picture_of(width, height)
        [size] = choose_sizes([picture], 64, 8, square)
        *original, top, left, target_height, target_width = ImageToEncode(picture, size, NO_AUGMENTATION, "x").time_ids
        assert (original, [target_height, target_width]) == ([height, width], list(size))
        pixels = (load_pixel_values(coordinates(width, height), *size, "bilinear") + 1) * 127.5
        scale = max(size[0] / height, size[1] / width)
        middle = size[0] // 2, size[1] // 2  # away from the edges, where resizing cannot average
        right_of_edge, below_edge = ((pixels[channel][middle].item() + 0.5) * scale - 0.5 for channel in (0, 1))
        assert right_of_edge - middle[1] == pytest.approx(left, abs=1)
        assert below_edge - middle[0] == pytest.approx(top, abs=1)


def coordinates(width: int, height: int) -> BytesIO:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    file = BytesIO()
    Image.fromarray(np.stack([across, down, across * 0], axis=-1).astype(np.uint8)).save(file, "PNG")
    return file


def test_a_mirrored_or_shrunk_picture_shows_the_same_crop():
    """Crops are centred, so mirroring keeps the distance to the left edge."""
    picture = picture_of(100, 50)
    plain, moved = (
        ImageToEncode(picture, (64, 64), augmentations, "x").time_ids
        for augmentations in (NO_AUGMENTATION, list_augmentations(True, 0.1))
    )
    assert plain == moved == (50, 100, 0, 32, 64, 64)
