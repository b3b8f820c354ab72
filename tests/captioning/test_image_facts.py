"""What is measured of pictures: blur at any size, and which of thousands are nearly the same."""

import numpy as np
from PIL import Image, ImageFilter

from captioning import image_facts
from captioning.image_facts import ImageFacts, find_near_duplicates, measure_image
from runtime.paths import DATASET


def test_the_same_shape_in_another_colour_is_another_picture(tmp_path):
    for name, colour in (("red", (200, 30, 40)), ("blue", (40, 60, 220))):
        image = Image.new("RGB", (400, 400), "white")
        image.paste(colour, (60, 90, 330, 310))
        image.save(tmp_path / f"{name}.png")
    images = [measure_image(path, path.name) for path in sorted(tmp_path.iterdir())]
    assert images[0].perceptual_hash == images[1].perceptual_hash and not list(find_near_duplicates(images))


def test_pictures_on_white_are_not_called_blurred():
    for path in DATASET.glob("*.JPG"):
        assert measure_image(path, path.name).blur < image_facts.BLURRED - 0.1


def test_how_blurred_a_picture_is_does_not_depend_on_its_size(tmp_path):
    photo = Image.open(DATASET / "11 (1).JPG").convert("RGB")
    large = photo.resize((2304, 3072), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
    large.save(tmp_path / "large.jpg")  # a radius of half a pixel where it is measured
    assert abs(measure_image(tmp_path / "large.jpg", "").blur - measure_image(DATASET / "11 (1).JPG", "").blur) < 0.05


def test_each_of_many_pictures_is_compared_with_each(monkeypatch):
    monkeypatch.setattr(image_facts, "BLOCK_ROWS", 64)
    bits = np.random.default_rng(0).integers(0, 256, (1000, 32), dtype=np.uint8)
    bits[700], bits[999] = bits[3], bits[998]
    bits[999, :3] ^= 255
    bits[400] = bits[5]
    bits[400, :4] ^= 255  # 32 bits: too far
    images = [
        ImageFacts(str(number), perceptual_hash=row.tobytes(), mean_colour=(9.0, 9.0, 9.0))
        for number, row in enumerate(bits)
    ]
    near = [(one.name, other.name, distance) for one, other, distance in find_near_duplicates(images)]
    assert near == [("700", "3", 0), ("999", "998", 24)]
