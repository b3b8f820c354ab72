"""Decoding goes through one place: of a few formats, below a limit, each fault of a file in plain words."""

import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import AvifImagePlugin, Image, ImageCms, PngImagePlugin

from clone import ROOT
from data.decoding import open_picture
from data.images import is_turned, open_image, read_image_size
from evaluation.copies import open_pictures
from generation.output_files import is_intact_image

NOT_USERS_PICTURES = {"captioner_pictures.py", "fetch_photos.py"}  # a JPEG in memory, and photographs it downloads


def test_no_script_opens_a_picture_by_another_way():
    code = (ROOT / "text_to_image").rglob("*.py")
    opening = {path.name for path in code if re.search(r"\bImage\.open\(|ImageFile\.Parser", path.read_text())}
    assert opening == {"decoding.py"} | NOT_USERS_PICTURES


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff", "bmp", "gif"])
def test_the_formats_that_are_promised_are_read_whatever_the_suffix_says(tmp_path, suffix):
    Image.new("RGB", (24, 16), "red").save(tmp_path / f"picture.{suffix}")
    (tmp_path / f"picture.{suffix}").rename(tmp_path / "renamed.jpg")
    assert read_image_size(tmp_path / "renamed.jpg") == (24, 16)


def test_a_picture_of_a_phone_with_another_behind_it_is_read(tmp_path):
    first, second = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (12, 8), "blue")
    first.save(tmp_path / "picture.jpg", "MPO", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "picture.jpg").format == "MPO"
    assert open_image(tmp_path / "picture.jpg").size == read_image_size(tmp_path / "picture.jpg") == (24, 16)


@pytest.mark.parametrize("suffix", ["eps", "jp2", "ppm", "tga", "ico"])
def test_no_other_format_is_tried_under_a_name_that_ends_in_jpg(tmp_path, suffix, monkeypatch):
    def ran(*arguments, **options):
        raise AssertionError(f"another program was run: {arguments}")

    monkeypatch.setattr("subprocess.check_call", ran)
    monkeypatch.setattr("subprocess.Popen", ran)
    Image.new("RGB", (24, 16), "red").save(tmp_path / f"picture.{suffix}")
    (tmp_path / f"picture.{suffix}").rename(tmp_path / "picture.jpg")
    with pytest.raises(ValueError, match="not a picture that can be read"):
        read_image_size(tmp_path / "picture.jpg")


@pytest.fixture
def damaged_avif(tmp_path):
    """A file whose decoder raises a RuntimeError."""
    path = tmp_path / "damaged.avif"
    Image.effect_noise((64, 48), 60).convert("RGB").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4].ljust(len(content), b"\0"))
    with pytest.raises(RuntimeError):
        Image.open(path).load()
    return path


def test_a_damaged_avif_is_that_files_fault_and_its_neighbour_goes_on(tmp_path, damaged_avif):
    Image.new("RGB", (9, 9)).save(tmp_path / "whole.png")
    with pytest.raises(ValueError, match="damaged"):
        open_image(damaged_avif)
    opened, unreadable = open_pictures([damaged_avif, tmp_path / "whole.png"], "--dataset", tmp_path)
    assert [path.name for path in opened] == ["whole.png"] and "damaged.avif" in unreadable[0]
    assert not is_intact_image(damaged_avif) and is_intact_image(tmp_path / "whole.png")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, KeyError, MemoryError, OverflowError, struct.error])
def test_whatever_a_decoder_raises_is_the_files_fault(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    Image.new("RGB", (9, 9)).save(tmp_path / "picture.avif")
    monkeypatch.setattr(AvifImagePlugin.AvifImageFile, "load", fail)
    for read in (read_image_size, open_image):
        with pytest.raises(ValueError, match="damaged"):
            read(tmp_path / "picture.avif")


def test_a_request_to_stop_is_no_fault_of_a_file(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    with pytest.raises(KeyboardInterrupt), open_picture(tmp_path / "picture.png"):
        raise KeyboardInterrupt


def test_what_the_file_system_refuses_is_not_called_damaged(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_image_size(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_image_size(tmp_path / "picture.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_turned_once_like_a_jpeg(tmp_path, orientation, compression):
    stored = Image.new("RGB", (32, 16), "white")
    stored.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.tiff", exif=exif, compression=compression)
    stored.save(tmp_path / "b.png", exif=exif)
    tiff, png = open_image(tmp_path / "a.tiff"), open_image(tmp_path / "b.png")
    assert tiff.size == read_image_size(tmp_path / "a.tiff") == read_image_size(tmp_path / "b.png")
    assert tiff.tobytes() == png.tobytes()
    assert is_turned(tmp_path / "a.tiff") == is_turned(tmp_path / "b.png") == (orientation > 1)


def test_a_picture_whose_exif_data_are_junk_is_whole(tmp_path):
    for name in ("a.jpg", "b.png", "c.webp"):
        Image.new("RGB", (24, 16), "red").save(tmp_path / name, exif=b"Exif\0\0junk that is no EXIF")
        assert open_image(tmp_path / name).size == read_image_size(tmp_path / name) == (24, 16)
        assert not is_turned(tmp_path / name)


def png_with(path: Path, **settings) -> Path:
    Image.new("RGB", (9, 9), "red").save(path, **settings)
    return path


def test_a_png_with_megabytes_of_text_or_profile_is_a_whole_picture(tmp_path):
    long = "node " * 600_000
    texts = {"plain": (long, False), "compressed": (long, True), "international": (long + "é", True)}
    for name, (text, compressed) in texts.items():
        info = PngImagePlugin.PngInfo()
        (info.add_text if text.isascii() else info.add_itxt)("workflow", text, zip=compressed)
        texts[name] = png_with(tmp_path / f"{name}.png", pnginfo=info)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3_000_000)
    for path in (*texts.values(), png_with(tmp_path / "profile.png", icc_profile=profile)):
        assert read_image_size(path) == (9, 9)
        assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_text_that_decompresses_without_end_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 70_000_000, zip=True)
    with pytest.raises(ValueError, match="damaged"):
        read_image_size(png_with(tmp_path / "bomb.png", pnginfo=info))


def header_only(size: tuple[int, int]) -> dict[str, bytes]:
    """Files that state a size and hold next to nothing of it."""
    width, height = size
    head = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + head + struct.pack(">I", zlib.crc32(head))
    bmp = b"BM" + struct.pack("<IHHIIiiHH", 0, 0, 0, 54, 40, width, height, 1, 24) + bytes(24)
    gif = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 9, 9, 0)
    webp = b"VP8L" + struct.pack("<IBIB", 5, 0x2F, (min(width, 16383) - 1) | (min(height, 16383) - 1) << 14, 0)
    return {
        "huge.png": png + b"\0\0\0\0IDAT\0\0\0\0",
        "huge.bmp": bmp,
        "huge.gif": gif + b"\x08\x01\0\0;",
        "huge.webp": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
    }


@pytest.mark.parametrize("name", header_only((1, 1)))
def test_a_picture_over_the_limit_is_refused_by_its_header_with_its_size(tmp_path, name):
    (tmp_path / name).write_bytes(header_only((60_000, 50_000))[name])
    with pytest.raises(ValueError, match=r"\d+ x \d+ pixels, more than the limit of 150,000,000; save it smaller"):
        read_image_size(tmp_path / name)


def test_an_empty_file_and_one_of_another_format_say_what_they_are(tmp_path):
    for content, said in ((b"", "an empty file"), (b"\0\0\0\x18ftypheic" + bytes(99), "save it as JPEG")):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_image_size(tmp_path / "a.jpg")
