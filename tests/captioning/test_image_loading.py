"""Pictures on their way to the captioner: small enough to wait in memory, upright, on white."""

from PIL import Image

from captioning.image_loading import LONGEST_SIDE, open_ahead


def test_huge_pictures_are_scaled_down_before_they_wait_for_the_model(tmp_path):
    Image.new("RGB", (4000, 2400), "navy").save(tmp_path / "1.jpg")
    Image.new("L", (100, 60)).save(tmp_path / "2.png")
    (_, large), (_, small) = open_ahead([tmp_path / "1.jpg", tmp_path / "2.png"])
    assert max(large.size) == LONGEST_SIDE and abs(large.width / large.height - 4000 / 2400) < 0.01
    assert (small.mode, small.size) == ("RGB", (100, 60))


def test_pictures_reach_the_model_upright_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 30), "red").save(tmp_path / "1.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "2.png")
    (_, turned), (_, clear) = open_ahead([tmp_path / "1.jpg", tmp_path / "2.png"])
    assert turned.size == (30, 60) and clear.getpixel((3, 3)) == (255, 255, 255)
