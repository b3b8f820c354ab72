"""Pictures: checked by name, upright, whole, on white."""

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import write_captioned_folder
from data import (
    PIXEL_LIMIT,
    Picture,
    cropped,
    hash_pictures,
    load_picture,
    measure,
    open_picture,
    read_pictures,
    training_size,
)
from errors import UserError


def picture_of(width: int, height: int) -> Picture:
    return Picture(Path("x"), width, height, (("a",),))


@pytest.mark.parametrize(
    ("sizes", "resolution", "multiple", "expected"),
    [
        ([(768, 1024)] * 3, 256, 32, (288, 224)),
        ([(768, 1024)] * 3, 512, 64, (576, 448)),
        ([(768, 1024)] * 3, 256, 64, (256, 192)),
        ([(1024, 768)] * 3, 256, 32, (224, 288)),
        ([(500, 500)], 256, 32, (256, 256)),
        ([(500, 500)], 256, 64, (256, 256)),
        ([(3000, 10)], 64, 32, (32, 128)),
        ([(100, 200), (100, 200), (300, 100)], 256, 32, (384, 192)),
    ],
)
def test_the_training_size_has_the_median_shape_and_the_area_asked_for(sizes, resolution, multiple, expected):
    size = training_size([picture_of(*size) for size in sizes], resolution, multiple)
    assert size == expected
    assert not size[0] % multiple and not size[1] % multiple


def test_a_portrait_picture_loses_no_more_than_is_said():
    assert cropped(1024 / 768, (288, 224)) == pytest.approx(0.036, abs=0.001)
    assert cropped(1.0, (256, 256)) == 0


def test_a_portrait_picture_keeps_its_top_and_its_bottom(tmp_path):
    image = Image.new("RGB", (768, 1024), "white")
    image.paste("red", (0, 0, 768, 60))
    image.paste("blue", (0, 964, 768, 1024))
    image.save(tmp_path / "portrait.png")
    pixels = load_picture(tmp_path / "portrait.png", 288, 224)
    assert pixels.shape == (3, 288, 224)
    assert torch.allclose(pixels[:, 2, 100], torch.tensor([1.0, -1.0, -1.0]), atol=0.02)
    assert torch.allclose(pixels[:, -3, 100], torch.tensor([-1.0, -1.0, 1.0]), atol=0.02)


def test_a_turned_photograph_stands_upright(tmp_path):
    upright = Image.new("RGB", (40, 80), "white")
    upright.paste("black", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert measure(tmp_path / "turned.png") == (40, 80)
    pixels = load_picture(tmp_path / "turned.png", 80, 40)
    assert pixels[:, :18].max() < -0.9 and pixels[:, 22:].min() > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 8))
    image.convert(mode).save(tmp_path / "clear.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = load_picture(tmp_path / "clear.png", 20, 20)
    assert pixels[:, 12:].min() > 0.99


def test_a_clear_colour_of_a_palette_becomes_white(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif", transparency=0)
    assert open_picture(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_pictures_of_other_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (20, 20), "white").convert(mode).save(tmp_path / "picture.tiff")
    assert load_picture(tmp_path / "picture.tiff", 20, 20).min() > 0.99


def bomb(path: Path, side: int) -> None:
    """A PNG of a few bytes that claims `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_every_unusable_picture_is_named_at_once_with_its_line_and_what_is_wrong(tmp_path):
    captions = {"whole.jpg": "a", "cut.jpg": "b", "text.jpg": "c", "huge.png": "d", "vast.png": "e", "cut.png": "f"}
    folder = write_captioned_folder(tmp_path / "data", captions)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    (folder / "text.jpg").write_text("not a picture")
    bomb(folder / "huge.png", int(PIXEL_LIMIT**0.5) + 1)
    bomb(folder / "vast.png", 60_000)
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-900])
    with pytest.raises(UserError) as error:
        read_pictures(folder, short_captions=True)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ")[1] for line in lines] == ["cut.jpg", "text.jpg", "huge.png", "vast.png", "cut.png"]
    assert "line 2" in lines[0] and "damaged" in lines[0] and "not a picture" in lines[1]
    assert "limit" in lines[2] and "limit" in lines[3] and "damaged" in lines[4]


def test_short_forms_of_captions_can_be_left_out(captioned_folder):
    with_forms, without = (read_pictures(captioned_folder, short) for short in (True, False))
    assert "denim jeans" in with_forms[0].captions
    assert [len(picture.captions) for picture in without] == [1, 1, 1]


def test_a_list_of_captions_is_kept_whole(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "x"})
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": ["one cat", "two words"]}))
    assert set(read_pictures(folder, short_captions=False)[0].captions) == {"one cat", "two words"}


def test_the_hash_changes_with_a_pixel_and_with_a_caption(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.png": "a", "2.png": "b"})
    before = hash_pictures(read_pictures(folder, True))
    assert hash_pictures(read_pictures(folder, True)) == before
    assert hash_pictures(read_pictures(folder, True)[::-1]) != before
    image = Image.open(folder / "1.png").convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(folder / "1.png")
    changed = hash_pictures(read_pictures(folder, True))
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace('"b"', '"c"'))
    assert len({before, changed, hash_pictures(read_pictures(folder, True))}) == 3
