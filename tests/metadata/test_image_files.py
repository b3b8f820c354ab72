"""The pictures of a folder: which files are, in which order, and which cannot be read."""

import re
from pathlib import Path

import pytest

from metadata.image_files import (
    find_image_files,
    find_mask_files,
    find_nested_image_files,
    find_unsupported_files,
    mask_key,
    no_pictures_message,
    picture_keys,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "10.webp", "9.webp"):
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def test_pictures_are_in_natural_order_without_hidden_ones(folder):
    (folder / "._a.jpg").touch()
    (folder / "notes.txt").touch()
    (folder / "folder.jpg").mkdir()
    assert [path.name for path in find_image_files(folder)] == ["9.webp", "10.webp", "a.jpg", "b.PNG"]


def test_what_phones_and_cameras_write_is_named_where_it_cannot_be_read(folder):
    for name in ("2.HEIC", "11.heic", "a.dng", "._3.heic"):
        (folder / name).touch()
    assert [path.name for path in find_unsupported_files(folder)] == ["2.HEIC", "11.heic"]  # a.jpg was made of a.dng
    for path in find_image_files(folder):
        path.unlink()
    assert "2.HEIC is in an unsupported format; save it as JPEG or PNG" in no_pictures_message(folder)


def test_pictures_below_are_found_unless_a_folder_may_not_be_entered(folder, monkeypatch):
    (folder / "below").mkdir()
    (folder / "below" / "c.jpg").write_bytes(b"x")
    right_in_it = find_image_files(folder)
    assert sorted(find_nested_image_files(folder)) == sorted([*right_in_it, folder / "below" / "c.jpg"])

    def closed(path, onerror):
        onerror(PermissionError(13, "Permission denied", "lost+found"))

    monkeypatch.setattr("os.walk", closed)
    assert find_nested_image_files(folder) == right_in_it


def test_pictures_in_sub_folders_are_found_but_not_in_hidden_ones_or_ones_with_captions_of_their_own(folder):
    for name in ("sub/é [1].JPG", "sub/10/a.png", "sub/2/a.png", ".hidden/a.jpg", "own/a.jpg", "own/deeper/a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for holder in (folder, folder / "own"):
        (holder / "metadata.jsonl").touch()
    found = [path.relative_to(folder).as_posix() for path in find_image_files(folder, recursive=True)]
    assert found[:4] == ["9.webp", "10.webp", "a.jpg", "b.PNG"]
    assert found[4:] == ["sub/2/a.png", "sub/10/a.png", "sub/é [1].JPG"]


def test_what_looks_like_a_picture_is_named_whatever_its_suffix_and_nothing_else(folder):
    named = {"a.jpe", "b.tga", "c.jp2", "d.jpg_large", "e", "f.jpg~", "g.webp_small", "h.img", "i.heic_", "j.psd"}
    starts = {"e": b"\x89PNG\r\n\x1a\n", "g.webp_small": b"RIFF\1\0\0\0WEBPVP8 ", "h.img": b"BM\1\0\0\0\0\0\0\0"}
    for name in named:
        (folder / name).write_bytes(
            starts.get(name, b"\0\0\0\x20ftypheic" if name == "i.heic_" else b"\xff\xd8\xff\xe0")
        )
    for name in ("README", "README.md", "a.txt", "metadata.csv", "metadata.jsonl", "report.html", "BMW", "x.bin", "y"):
        (folder / name).write_bytes(b"BMW cars and other words, " * 2)
    for name in ("9.mask.png", "contact_sheet.jpg", "copies_sheet.jpg", ".hidden", "z"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" if name != "z" else b"")
    assert {path.name for path in find_unsupported_files(folder)} == named


def test_what_is_named_as_a_mask_is_no_picture(folder):
    masks = {"9.mask.png", "a.MASK.PNG", "a.jpg.mask.webp", "alone.mask.png", "b-masklabel.png"}
    for name in (*masks, ".mask.png", "-masklabel.png"):
        (folder / name).touch()
    names = [path.name for path in find_image_files(folder)]
    assert names == ["9.webp", "10.webp", "-masklabel.png", "a.jpg", "b.PNG"]
    assert {path.name for path in find_mask_files(folder)} == masks


def test_a_folder_of_masks_alone_says_what_they_are_taken_for(tmp_path):
    (tmp_path / "carnival.mask.jpg").touch()
    assert re.search(r"carnival\.mask\.jpg .* mask", no_pictures_message(tmp_path))


def test_a_mask_is_named_after_its_picture_in_any_case_with_or_without_its_suffix():
    def is_of(mask, picture):
        return mask_key(Path("in") / mask) in picture_keys(Path("in") / picture)

    for mask in ("Évreux 1.mask.png", "e\u0301vreux 1-masklabel.png", "ÉVREUX 1.JPG.MASK.WEBP"):
        assert is_of(mask, "Évreux 1.JPG")
    assert not any(
        is_of(mask, "1.jpg") for mask in ("11.mask.png", "1.png.mask.png", "2/1.mask.png", "1.mask.mask.png")
    )


def test_only_what_the_safety_checker_withheld_is_left_out_as_that(folder):
    for name in ("coat-withheld.jpg", "coat-withheld.png", "a-red-coat-adb88571-000003-withheld.png"):
        (folder / name).touch()
    assert {path.name for path in find_image_files(folder)} >= {"coat-withheld.jpg", "coat-withheld.png"}
    assert len(find_image_files(folder)) == 6
