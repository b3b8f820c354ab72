"""captions.py: rows are read and checked all at once, and appending changes nothing that was there."""

import json
import os
from pathlib import Path

import pytest

from data.metadata import (
    append_captions,
    image_files,
    image_files_below,
    read_captions,
    read_existing_captions,
    scan_rows,
    unsupported_files,
)
from runtime.errors import UserError, WorkError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "10.webp", "9.webp"):
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def write(folder: Path, *lines: object) -> None:
    """Each line as JSON, strings and bytes as they are."""
    raw = [json.dumps(line) if isinstance(line, (dict, list, int)) else line for line in lines]
    raw = [line if isinstance(line, bytes) else line.encode() for line in raw]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(raw))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_captions(folder)
    return str(caught.value)


def test_rows_are_read_in_file_order_with_their_lines(folder):
    write(folder, {"file_name": "b.PNG", "text": "one"}, "", {"file_name": "a.jpg", "text": ["two", "zwei"]}, "")
    rows = read_captions(folder)
    assert [(row.file_name, row.captions, row.line) for row in rows] == [
        ("b.PNG", ("one",), 1),
        ("a.jpg", ("two", "zwei"), 3),
    ]
    assert rows[1].path(folder) == folder / "a.jpg"


def test_byte_order_mark_windows_line_ends_and_line_separators_in_captions_are_fine(folder):
    first, second = {"file_name": "a.jpg", "text": "é"}, '{"file_name": "b.PNG", "text": "one\u2028caption"}'
    write(folder, b"\xef\xbb\xbf" + json.dumps(first).encode() + b"\r", second)
    assert [row.captions[0] for row in read_captions(folder)] == ["é", "one\u2028caption"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b'{"file_name": "a.jpg", "text": "caf\xe9"}', "not UTF-8"),
        (["a.jpg", "text"], "expected"),
        ({"text": "no name"}, "`file_name` must be"),
        ({"file_name": 7, "text": "t"}, "`file_name` must be"),
        ({"file_name": "", "text": "t"}, "`file_name` must be"),
        ({"file_name": "/etc/hostname", "text": "t"}, "must stay inside"),
        ({"file_name": "../a.jpg", "text": "t"}, "must stay inside"),
        ({"file_name": "c.jpg", "text": "t"}, "missing"),
        ({"file_name": "empty.jpg", "text": "t"}, "empty file"),
        ({"file_name": "away.jpg", "text": "t"}, "link out of the folder"),
        ({"file_name": "a.jpg\0", "text": "t"}, "cannot be a file"),
        ({"file_name": "x" * 5000, "text": "t"}, "cannot be a file"),
        ({"file_name": "\ud800", "text": "t"}, "cannot be a file"),
        ({"file_name": "a.jpg"}, "`text` must be"),
        ({"file_name": "a.jpg", "text": None}, "`text` must be"),
        ({"file_name": "a.jpg", "text": 5}, "`text` must be"),
        ({"file_name": "a.jpg", "text": []}, "`text` must be"),
        ({"file_name": "a.jpg", "text": ["t", 5]}, "`text` must be"),
        ({"file_name": "a.jpg", "text": " \n"}, "`text` is empty"),
        ({"file_name": "a.jpg", "text": ["t", ""]}, "a caption in `text` is empty"),
        ({"file_name": "a.jpg", "text": "\udc80"}, "lone surrogate"),
        ({"file_name": "./b.PNG", "text": "again"}, "has a row already, line 1"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(folder, row, complaint):
    (folder / "empty.jpg").touch()
    (folder / "away.jpg").symlink_to("/etc/hostname")
    write(folder, {"file_name": "b.PNG", "text": "good"}, row)
    message = refusal(folder)
    assert "metadata.jsonl, line 2: " in message and complaint in message
    assert len(message) < 500


def test_all_bad_rows_are_listed_at_once(folder):
    write(folder, "nonsense", {"file_name": "a.jpg", "text": "good"}, {"file_name": "a.jpg", "text": ""}, 5)
    message = refusal(folder)
    assert message.startswith("3 bad rows in ")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        f"metadata.jsonl, line {number}" for number in (1, 3, 4)
    ]


def test_terminal_codes_in_a_row_do_not_reach_the_terminal(folder):
    write(folder, {"file_name": "\x1b[31mred.jpg", "text": "t"})
    assert "\x1b" not in refusal(folder)


def test_what_is_missing_is_named(tmp_path, folder):
    assert "metadata.jsonl" in refusal(folder) and "img_captioning.py" in refusal(folder)
    assert "no data set folder" in refusal(tmp_path / "nowhere")
    assert "is not a folder" in refusal(folder / "a.jpg")
    write(folder)
    assert "has no rows" in refusal(folder)
    (tmp_path / "no pictures").mkdir()
    assert "no pictures in" in refusal(tmp_path / "no pictures")


def test_pictures_are_in_natural_order_without_hidden_ones(folder):
    (folder / "._a.jpg").touch()
    (folder / "notes.txt").touch()
    (folder / "folder.jpg").mkdir()
    assert [path.name for path in image_files(folder)] == ["9.webp", "10.webp", "a.jpg", "b.PNG"]


def test_what_phones_and_cameras_write_is_named_where_it_cannot_be_read(folder):
    for name in ("2.HEIC", "11.heic", "a.dng", "._3.heic"):
        (folder / name).touch()
    assert [path.name for path in unsupported_files(folder)] == ["2.HEIC", "11.heic"]  # a.jpg was made of a.dng
    for path in image_files(folder):
        path.unlink()
    assert "2.HEIC is of a kind that is not; save it as JPEG or PNG" in refusal(folder)


def test_pictures_below_are_found_unless_a_folder_may_not_be_entered(folder, monkeypatch):
    (folder / "below").mkdir()
    (folder / "below" / "c.jpg").write_bytes(b"x")
    right_in_it = image_files(folder)
    assert sorted(image_files_below(folder)) == sorted([*right_in_it, folder / "below" / "c.jpg"])

    def closed(path, onerror):
        onerror(PermissionError(13, "Permission denied", "lost+found"))

    monkeypatch.setattr("os.walk", closed)
    assert image_files_below(folder) == right_in_it


def test_a_folder_without_metadata_has_no_rows_yet(folder):
    assert read_existing_captions(folder) == []


def test_a_picture_that_has_a_row_gets_no_second_one(folder):
    write(folder, {"file_name": "./a.jpg", "text": "mine"})
    append_captions(folder, [("a.jpg", "new"), ("b.PNG", "new")])
    assert [(row.file_name, row.captions) for row in read_captions(folder)] == [
        ("./a.jpg", ("mine",)),
        ("b.PNG", ("new",)),
    ]


def test_pictures_in_sub_folders_are_found_but_not_in_hidden_ones_or_ones_with_captions_of_their_own(folder):
    for name in ("sub/é [1].JPG", "sub/10/a.png", "sub/2/a.png", ".hidden/a.jpg", "own/a.jpg", "own/deeper/a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "own" / "metadata.jsonl").touch()
    write(folder, {"file_name": "a.jpg", "text": "t"})
    found = [path.relative_to(folder).as_posix() for path in image_files(folder, recursive=True)]
    assert found[:4] == ["9.webp", "10.webp", "a.jpg", "b.PNG"]
    assert found[4:] == ["sub/2/a.png", "sub/10/a.png", "sub/é [1].JPG"]


def test_rows_of_gone_pictures_and_without_captions_are_found_as_they_stand(folder):
    write(
        folder, {"file_name": "a.jpg", "text": ["one", " "]}, {"file_name": "gone.jpg", "text": "t"}, "",
        {"file_name": "../a.jpg", "text": None}, {"file_name": "./a.jpg", "text": "again"},
    )  # fmt: skip
    rows = scan_rows(folder / "metadata.jsonl", folder)
    assert [(row.file_name, row.captions, row.line) for row in rows] == [
        ("a.jpg", ("one",), 1), ("gone.jpg", ("t",), 2), ("../a.jpg", (), 4), ("./a.jpg", ("again",), 5),
    ]  # fmt: skip
    assert [row.caption_fault for row in rows][1::2] == [None, None]
    assert "a caption in `text` is empty" in rows[0].caption_fault and "`text` must be" in rows[2].caption_fault
    assert [fault and fault.split()[-1] for fault in (row.picture_fault for row in rows)] == [
        None, "missing", '"../a.jpg"', "list",
    ]  # fmt: skip
    assert "has a row already, line 1" in rows[3].picture_fault


def test_rows_without_a_readable_name_are_refused_all_at_once(folder):
    write(folder, {"file_name": "a.jpg", "text": ""}, "{", {"text": "no name"})
    with pytest.raises(UserError, match="^2 bad rows in .*\n.*line 2: not JSON.*\n.*line 3: `file_name` must be"):
        scan_rows(folder / "metadata.jsonl", folder)
    assert scan_rows(folder / "none.jsonl", folder) == []


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
