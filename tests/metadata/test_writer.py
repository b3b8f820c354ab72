"""Rows are added to metadata.jsonl, and nothing that was there changes."""

import os

import pytest

from metadata.reading import read_captions
from metadata.writer import append_captions
from runtime.errors import WorkError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "10.webp", "9.webp"):
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def test_a_picture_that_has_a_row_gets_no_second_one(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "./a.jpg", "text": "mine"}')
    append_captions(folder, [("a.jpg", "new"), ("b.PNG", "new")])
    assert [(row.file_name, row.captions) for row in read_captions(folder)] == [
        ("./a.jpg", ("mine",)),
        ("b.PNG", ("new",)),
    ]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_appending_keeps_what_was_there_byte_for_byte(folder, end):
    before = (
        b'\xef\xbb\xbf{ "text":"caf\\u00e9" ,"file_name":"a.jpg", "more": 1}\r\n\r\n{"file_name":"b.PNG","text":"t"}'
    )
    (folder / "metadata.jsonl").write_bytes(before + end)
    append_captions(folder, [("9.webp", 'a "quoted" é\nline')])
    after = (folder / "metadata.jsonl").read_bytes()
    assert after.startswith(before + end) and after.endswith(b"\n")
    assert [row.captions[0] for row in read_captions(folder)] == ["café", "t", 'a "quoted" é\nline']


def test_appending_starts_a_file_and_leaves_nothing_else(folder):
    names = sorted(os.listdir(folder))
    append_captions(folder, [("a.jpg", "one")])
    append_captions(folder, [("b.PNG", "two")])
    assert [row.file_name for row in read_captions(folder)] == ["a.jpg", "b.PNG"]
    assert sorted(os.listdir(folder)) == sorted([*names, "metadata.jsonl"])


def test_a_reader_never_sees_half_a_row(folder):
    append_captions(folder, [("a.jpg", "one")])
    with open(folder / "metadata.jsonl", "rb") as opened_before:
        append_captions(folder, [("b.PNG", "two")])
        assert opened_before.read().count(b"\n") == 1  # the old file is whole; the new one took its name


def test_an_append_that_fails_changes_nothing(folder, monkeypatch):
    append_captions(folder, [("a.jpg", "one")])
    before, names = (folder / "metadata.jsonl").read_bytes(), sorted(os.listdir(folder))

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(WorkError, match="No space left"):
        append_captions(folder, [("b.PNG", "two")])
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert sorted(os.listdir(folder)) == names


def test_appending_keeps_a_link_and_the_mode(folder, tmp_path):
    target = tmp_path / "elsewhere.jsonl"
    target.touch(mode=0o640)
    (folder / "metadata.jsonl").symlink_to(target)
    append_captions(folder, [("a.jpg", "one")])
    assert (folder / "metadata.jsonl").is_symlink() and b"one" in target.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o640
