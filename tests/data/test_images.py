"""Image files: checked, measured and opened: upright, in sRGB, on white."""

import struct
import zlib
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data.images import load_pixel_values, open_image, read_image_size


def test_a_portrait_picture_keeps_its_top_and_its_bottom(tmp_path):
    image = Image.new("RGB", (768, 1024), "white")
    image.paste("red", (0, 0, 768, 60))
    image.paste("blue", (0, 964, 768, 1024))
    image.save(tmp_path / "portrait.png")
    pixels = load_pixel_values(tmp_path / "portrait.png", 288, 224)
    assert pixels.shape == (3, 288, 224)
    assert torch.allclose(pixels[:, 2, 100], torch.tensor([1.0, -1.0, -1.0]), atol=0.02)
    assert torch.allclose(pixels[:, -3, 100], torch.tensor([-1.0, -1.0, 1.0]), atol=0.02)


def test_a_turned_photograph_stands_upright(tmp_path):
    upright = Image.new("RGB", (40, 80), "white")
    upright.paste("black", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert read_image_size(tmp_path / "turned.png") == (40, 80)
    pixels = load_pixel_values(tmp_path / "turned.png", 80, 40)
    assert pixels[:, :18].max() < -0.9 and pixels[:, 22:].min() > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 8))
    image.convert(mode).save(tmp_path / "clear.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = load_pixel_values(tmp_path / "clear.png", 20, 20)
    assert pixels[:, 12:].min() > 0.99


def test_a_clear_colour_of_a_palette_becomes_white(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif", transparency=0)
    assert open_image(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_pictures_of_other_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (20, 20), "white").convert(mode).save(tmp_path / "picture.tiff")
    assert load_pixel_values(tmp_path / "picture.tiff", 20, 20).min() > 0.99


SRGB_PRIMARIES = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]


def fixed_point(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc_profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of a colour space, 'RGB ', 'GRAY' or 'CMYK', with nothing in it but what colour needs."""
    table, bodies, end = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, end + len(bodies), len(tag))
        bodies += tag
    head = struct.pack(">I4sI4s4s4s", end + len(bodies), b"", 0x02400000, b"scnr", space, connection)
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0") + fixed_point(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + bodies


def curve(*entries: int) -> bytes:
    """No entry: linear; one: a gamma of so many 256ths; several: a table of 0..65535. To a multiple of four bytes."""
    body = b"curv" + struct.pack(f">II{len(entries)}H", 0, len(entries), *entries)
    return body + bytes(-len(body) % 4)


def rgb_profile(primaries: list[tuple[float, ...]], tone: bytes) -> bytes:
    colours = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True))
    tags = {name: b"XYZ \0\0\0\0" + fixed_point(*colour) for name, colour in colours.items()}
    return icc_profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone))


def cmyk_profile(cyan: tuple[int, int, int]) -> bytes:
    """A press with two inks: its cyan looks like `cyan` (L, a, b as bytes), its black is a dark grey."""
    corners = product((0, 1), repeat=4)
    colours = [(26, 128, 128) if black else cyan if cyan_ink else (255, 128, 128) for cyan_ink, *_, black in corners]
    identity = fixed_point(1, 0, 0, 0, 1, 0, 0, 0, 1)
    straight, table = bytes(range(256)), bytes(chain.from_iterable(colours))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    return icc_profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut})


def srgb_curve() -> bytes:
    shares = [i / 1023 for i in range(1024)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return curve(*(round(65535 * share) for share in linear))


RED, GREEN, BLUE = SRGB_PRIMARIES
LINEAR = rgb_profile(SRGB_PRIMARIES, curve())
SWAPPED = rgb_profile([GREEN, RED, BLUE], srgb_curve())
SRGB_BY_ANOTHER_NAME = rgb_profile(SRGB_PRIMARIES, srgb_curve())
LINEAR_GREY = icc_profile(b"GRAY", b"XYZ ", {b"kTRC": curve()})
BROWN_INK = cmyk_profile((128, 158, 158))


def pixel(path: Path) -> tuple[int, ...]:
    """What the picture shows at its first pixel; `read_image_size` has to accept it."""
    read_image_size(path)
    picture = open_image(path)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


def near(colour: tuple[int, ...]):
    return pytest.approx(colour, abs=2)


FILES = {
    "RGB": ["1.png", "2.jpg", "3.tiff", "4.webp"],
    "L": ["1.png", "2.jpg", "3.tiff"],
    "1": ["1.png", "2.tiff"],
    "I;16": ["1.png", "2.tiff"],
    "CMYK": ["1.jpg", "2.tiff"],
    "YCbCr": ["1.tiff"],
}


@pytest.mark.parametrize(
    ("mode", "stored", "profile", "shown"),
    [
        ("RGB", (128, 128, 128), LINEAR, (188, 188, 188)),
        ("RGB", (255, 0, 0), SWAPPED, (0, 255, 0)),
        ("L", 128, LINEAR_GREY, (188, 188, 188)),
        ("1", 1, LINEAR_GREY, (255, 255, 255)),
        ("I;16", 128 * 257, LINEAR_GREY, (188, 188, 188)),
        ("YCbCr", (76, 85, 255), SWAPPED, (0, 255, 0)),
        ("CMYK", (255, 0, 0, 0), BROWN_INK, (174, 94, 63)),
        ("CMYK", (0, 0, 0, 255), BROWN_INK, (0, 0, 0)),
        ("CMYK", (0, 0, 0, 0), BROWN_INK, (255, 255, 255)),
    ],
)
def test_a_colour_profile_says_which_colours_are_meant(tmp_path, mode, stored, profile, shown):
    for file_name in FILES[mode]:
        Image.new(mode, (16, 16), stored).save(tmp_path / file_name, icc_profile=profile, quality=100)
        assert pixel(tmp_path / file_name) == near(shown)


def test_a_profile_changes_the_colours_and_not_the_transparency(tmp_path):
    image = Image.new("RGBA", (2, 1), (128, 128, 128, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png", icc_profile=LINEAR)
    image.convert("LA").save(tmp_path / "grey.png", icc_profile=LINEAR_GREY)
    image.quantize().save(tmp_path / "palette.png", icc_profile=LINEAR)
    image.convert("PA").save(tmp_path / "palette.tiff", icc_profile=LINEAR)
    for path in tmp_path.iterdir():
        assert pixel(path) == near((188, 188, 188))
        assert open_image(path).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        SRGB_BY_ANOTHER_NAME,
        b"no profile",
        LINEAR[:200],
        LINEAR_GREY,
        BROWN_INK,
    ],
    ids=["srgb", "nameless", "junk", "cut", "grey", "cmyk"],
)
def test_a_profile_that_says_nothing_new_leaves_every_pixel_as_it_is(tmp_path, profile):
    stored = Image.effect_noise((64, 64), 90).convert("RGB")
    stored.putdata(list(product(range(0, 256, 17), repeat=3)))
    stored.save(tmp_path / "picture.png", icc_profile=profile)
    read_image_size(tmp_path / "picture.png")
    assert open_image(tmp_path / "picture.png").tobytes() == stored.tobytes()


def test_the_profile_and_the_orientation_of_a_file_do_not_outlive_its_opening(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg", exif=exif, icc_profile=SRGB_BY_ANOTHER_NAME)
    picture = open_image(tmp_path / "picture.jpg")
    assert "icc_profile" not in picture.info and 274 not in picture.getexif()


def test_a_turned_photograph_with_malformed_exif_data_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[274], exif[282] = 6, 72.0
    Image.new("RGB", (8, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    as_rational, as_bytes = struct.pack(">HH", 282, 5), struct.pack(">HH", 282, 2)
    damaged = (tmp_path / "turned.jpg").read_bytes().replace(as_rational, as_bytes)
    (tmp_path / "turned.jpg").write_bytes(damaged)
    assert read_image_size(tmp_path / "turned.jpg") == open_image(tmp_path / "turned.jpg").size == (16, 8)


def shown_greys(path: Path, values: list, kind: str) -> list[int]:
    """What a picture of one row of these values shows."""
    Image.fromarray(np.array([values], dtype=kind)).save(path)
    read_image_size(path)
    red, green, blue = np.asarray(open_image(path))[0].T.tolist()
    assert red == green == blue
    return red


@pytest.mark.parametrize("file_name", ["grey.png", "grey.tiff"])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path, file_name, kind):
    assert shown_greys(tmp_path / file_name, [0, 257, 25700, 40000, 65535], kind) == [0, 1, 100, 156, 255]


@pytest.mark.parametrize(
    ("values", "kind", "shown"),
    [
        ([-5, 100, 255], "int32", [0, 100, 255]),
        ([0, 25700, 65535], "int32", [0, 100, 255]),
        ([0, 2**30, 2**31 - 1], "int32", [0, 128, 255]),
        ([0.0, 0.5, 1.0], "float32", [0, 128, 255]),
        ([-0.1, 0.5, 1.1], "float32", [0, 128, 255]),
        ([0.0, 100.0, 255.0], "float32", [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], "float32", [0, 100, 255]),
        ([float("nan"), 0.5, 1.0], "float32", [0, 128, 255]),
        ([float("inf"), 0.5, 1.0], "float32", [0, 128, 255]),
    ],
)
def test_the_white_of_grey_numbers_is_the_one_that_their_largest_comes_near(tmp_path, values, kind, shown):
    assert shown_greys(tmp_path / "grey.tiff", values, kind) == shown


def test_a_tiff_that_says_it_has_twelve_bits_is_scaled_by_them(tmp_path):
    packed = bytes.fromhex("000800fff064")  # 0, 2048, 4095, 100
    short = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 10 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(packed)}
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short.items())
    (tmp_path / "grey.tiff").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(short)) + tags + bytes(4) + packed)
    assert read_image_size(tmp_path / "grey.tiff") == (4, 1)
    assert [red for red, _, _ in np.asarray(open_image(tmp_path / "grey.tiff"))[0].tolist()] == [0, 128, 255, 6]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, colour_type: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row of two pixels; Pillow writes none of 16 bits with colour or with transparency."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("colour_type", "channels", "shown"),
    [
        (0, (40000,), (156, 156, 156)),
        (2, (40000, 20000, 65535), (156, 78, 255)),
        (4, (0, 32768), (127, 127, 127)),
        (6, (0, 65535, 0, 32768), (127, 255, 127)),
    ],
)
def test_a_png_of_sixteen_bits_shows_its_colours(tmp_path, colour_type, channels, shown):
    pixels = struct.pack(f">{len(channels)}H", *channels) * 2
    (tmp_path / "deep.png").write_bytes(png(16, colour_type, pixels))
    assert pixel(tmp_path / "deep.png") == pytest.approx(shown, abs=1)


def test_only_the_grey_of_sixteen_bits_that_is_called_clear_becomes_white(tmp_path):
    clear = (b"tRNS", struct.pack(">H", 1000))
    (tmp_path / "deep.png").write_bytes(png(16, 0, struct.pack(">HH", 1001, 1000), clear))
    assert pixel(tmp_path / "deep.png") == (4, 4, 4)
    assert open_image(tmp_path / "deep.png").getpixel((1, 0)) == (255, 255, 255)


def test_a_clear_value_of_any_depth_of_png_becomes_white(tmp_path):
    for depth, colour_type, pixels, clear in [(1, 0, b"\x40", b"\0\1"), (8, 0, b"\0\7", b"\0\7")]:
        (tmp_path / "clear.png").write_bytes(png(depth, colour_type, pixels, (b"tRNS", clear)))
        picture = open_image(tmp_path / "clear.png")
        assert (pixel(tmp_path / "clear.png"), picture.getpixel((1, 0))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_degrees_of_transparency_is_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([255, 128]))
    assert pixel(tmp_path / "palette.png") == (255, 0, 0)
    assert open_image(tmp_path / "palette.png").getpixel((1, 0)) == pytest.approx((127, 127, 255), abs=1)


@pytest.mark.parametrize(
    ("mode", "stored", "shown"),
    [
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 255, 0), (255, 255, 0)),
        ("LAB", (136, 208, 195), (250, 3, 11)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("PA", 0, (255, 255, 255)),
    ],
)
def test_other_ways_to_write_a_colour_show_it(tmp_path, mode, stored, shown):
    image = Image.new(mode, (8, 8), stored)
    image.save(tmp_path / "picture.tiff")
    assert Image.open(tmp_path / "picture.tiff").mode == mode
    assert pixel(tmp_path / "picture.tiff") == near(shown)


def test_a_premultiplied_grey_of_half_transparency_is_laid_on_white(tmp_path):
    Image.new("LA", (8, 8), (64, 128)).save(tmp_path / "grey.tiff")
    apart, premultiplied = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))
    (tmp_path / "grey.tiff").write_bytes((tmp_path / "grey.tiff").read_bytes().replace(apart, premultiplied))
    assert Image.open(tmp_path / "grey.tiff").mode == "La"
    assert pixel(tmp_path / "grey.tiff") == near((191, 191, 191))


@pytest.mark.parametrize("profile", [None, BROWN_INK], ids=["plain", "profile"])
def test_a_jpeg_of_photoshop_with_inverted_inks_shows_its_colours(tmp_path, profile):
    stored = {"inks": (255, 0, 0, 0), "ycck": (255 - 76, 255 - 85, 255 - 255, 0)}
    for name, values in stored.items():
        Image.new("CMYK", (16, 16), values).save(tmp_path / name, "JPEG", quality=100, icc_profile=profile)
    file = bytearray((tmp_path / "ycck").read_bytes())
    file[file.index(b"Adobe") + 11] = 2  # says that the first three channels are Y, Cb and Cr
    (tmp_path / "ycck").write_bytes(file)
    for name in stored:
        assert pixel(tmp_path / name) == near((174, 94, 63) if profile else (0, 255, 255))


@pytest.mark.parametrize("size", [(1, 1), (7, 20), (8, 8)])
def test_the_smallest_jpeg_is_a_picture(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "small.jpg")
    assert read_image_size(tmp_path / "small.jpg") == open_image(tmp_path / "small.jpg").size == size


def test_a_picture_that_cannot_become_rgb_is_refused_when_it_is_measured(tmp_path, monkeypatch):
    def refuse(image):
        raise ValueError(f"conversion from {image.mode} to RGB not supported")

    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    monkeypatch.setattr("data.images._to_srgb", refuse)
    with pytest.raises(ValueError, match="not supported"):
        read_image_size(tmp_path / "picture.png")
