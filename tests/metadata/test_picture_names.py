"""The picture that a row names: NFC and NFD are one name, and a near miss is named with what it probably means."""

import unicodedata
from pathlib import Path

import pytest

from metadata.picture_names import MissingPicture, PictureNames
from metadata.reading import read_captions, scan_rows
from metadata.writer import write_captions
from runtime.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "café é.jpg") for form in ("NFC", "NFD"))


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a picture")
    return folder


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC), (f"{NFC}/{NFD}", f"{NFD}/{NFC}")])
def test_composed_and_decomposed_names_are_the_same(tmp_path, written, on_disk):
    folder, path = make(tmp_path, on_disk), tmp_path / "metadata.jsonl"
    write_captions(path, {written: "a dog"})
    [row] = read_captions(folder)
    assert row.file_name == on_disk and row.path(folder).is_file()
    assert write_captions(path, {on_disk: "a cat"}) == {}
    assert write_captions(path, {on_disk: "a cat"}, "replace") and path.read_text().count("\n") == 1
    assert read_captions(folder)[0].captions == ("a cat",)


def test_two_rows_for_one_picture_are_found_whatever_their_form(tmp_path):
    make(tmp_path, NFD)
    (tmp_path / "metadata.jsonl").write_text(
        f'{{"file_name": "{NFC}", "text": "a"}}\n{{"file_name": "{NFD}", "text": "b"}}\n'
    )
    with pytest.raises(UserError, match="line 2: .*has a row already, line 1"):
        read_captions(tmp_path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("img_1.jpg", "IMG_1.JPG"),
        ("IMG 1.JPG", "IMG_1.JPG"),
        ("IMG-1", "IMG_1.JPG"),
        ("IMG-1__1.JPG", None),
        ("img 2 -3.jpg", "IMG2_3.JPG"),
        ("IMG_1.png", "IMG_1.JPG"),
        ("IMG_1.JPG.jpg", "IMG_1.JPG"),
        ("train/IMG_1.JPG", "IMG_1.JPG"),
        ("below\\b.png", "below/b.png"),
        ("C:\\pictures\\IMG_1.JPG", "IMG_1.JPG"),
        ("b.png", "below/b.png"),
        ("cafe.png", "café.png"),
        ("IMG_2.JPG", None),
        ("other.jpg", None),
    ],
)
def test_a_near_miss_is_named_with_the_file_that_it_probably_means(tmp_path, written, meant):
    make(tmp_path, "IMG_1.JPG", "IMG11.JPG", "IMG2_3.JPG", "below/b.png", "café.png", "a.png")
    with pytest.raises(MissingPicture, match="is missing") as caught:
        PictureNames(tmp_path).find(written)
    assert caught.value.probably == meant and (meant or "") in str(caught.value)


def test_a_name_in_other_characters_is_asked_about_and_not_taken_for_sure(tmp_path):
    make(tmp_path, "中文图片 1.jpg", "中文图片 2.jpg")
    with pytest.raises(MissingPicture, match='is "中文图片 1.jpg" meant') as caught:
        PictureNames(tmp_path).find("中文圖片 1.jpg")
    assert caught.value.probably is None


def test_the_nearest_of_several_is_named(tmp_path):
    make(tmp_path, "dogs/1.jpg", "cans/1.jpg", "cans/1.png")
    with pytest.raises(MissingPicture) as caught:
        PictureNames(tmp_path).find("all/cans/1.JPG")
    assert caught.value.probably == "cans/1.jpg"


def test_names_are_printed_as_they_are_written(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\\u4e2d文é\\u009b.jpg", "text": "x"}\n')
    [row] = scan_rows(tmp_path / "metadata.jsonl", tmp_path)
    assert "中文é" in row.picture_fault and "\x9b" not in row.picture_fault
