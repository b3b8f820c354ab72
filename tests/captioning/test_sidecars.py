"""Captions in text files beside the pictures."""

import pytest
from PIL import Image

from captioning.sidecars import read_sidecar
from data.metadata import read_captions
from img_captioning import caption_or_check, parse_args
from runtime.errors import UserError, WorkError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.jpg", "d.jpg"):
        Image.new("RGB", (40, 60), (10, 20, len(name))).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a blue pair of jeans\n", encoding="utf-8-sig")
    (tmp_path / "b.caption").write_bytes("jeans,  from the back\r\n\r\nein Paar Jeans für Änne\r\n".encode())
    (tmp_path / "c.txt").write_text(" \n")
    return tmp_path


def test_a_text_file_has_a_caption_in_each_line(folder):
    assert read_sidecar(folder / "a.jpg") == ["a blue pair of jeans"]
    assert read_sidecar(folder / "b.PNG") == ["jeans, from the back", "ein Paar Jeans für Änne"]
    assert read_sidecar(folder / "c.jpg") == read_sidecar(folder / "d.jpg") == []
    assert read_sidecar(folder / f"{'x' * 250}.jpg") == []  # `.caption` would be too long a name
    (folder / "c.caption").write_text("jeans\u2028seen from the back", encoding="utf-8")
    assert read_sidecar(folder / "c.jpg") == ["jeans seen from the back"]


def test_one_that_is_not_utf_8_is_named(folder):
    (folder / "d.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(UserError, match=r"d\.txt: not UTF-8 \(byte 2\)"):
        read_sidecar(folder / "d.jpg")


def test_they_become_rows_before_a_captioner_is_loaded(folder, capsys):
    kept = b'{"file_name": "a.jpg", "text": "mine"}\n'
    (folder / "metadata.jsonl").write_bytes(kept)
    (folder / "d.txt").write_text("damaged")
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match="no/such-captioner"):  # c.jpg and d.jpg want one
        caption_or_check(
            parse_args(["--image_dir", str(folder), "--model", "no/such-captioner", "--trigger", "sks jeans"])
        )
    assert "pictures with a text file beside them: 1;" in capsys.readouterr().out
    assert (folder / "metadata.jsonl").read_bytes().startswith(kept)
    assert [(row.file_name, row.captions) for row in read_captions(folder)][1:] == [
        ("b.PNG", ("sks jeans, jeans, from the back", "sks jeans, ein Paar Jeans für Änne"))
    ]


def test_a_broken_picture_is_named_without_a_captioner_where_it_is_all_that_is_left(folder):
    (folder / "c.txt").write_text("whole")
    (folder / "d.txt").write_text("damaged")
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:-200])
    with pytest.raises(WorkError, match=r"1 picture without a caption:\n  d\.jpg: damaged"):
        caption_or_check(parse_args(["--image_dir", str(folder), "--model", "no/such-captioner"]))
    assert [row.file_name for row in read_captions(folder)] == ["a.jpg", "b.PNG", "c.jpg"]


def test_a_replacement_is_the_captioners(folder):
    with pytest.raises(UserError, match="no/such-captioner"):
        caption_or_check(
            parse_args(["--image_dir", str(folder), "--model", "no/such-captioner", "--existing", "replace"])
        )
    assert not (folder / "metadata.jsonl").exists()


def test_where_all_pictures_have_one_no_captioner_is_loaded(folder, capsys):
    for name in "cd":
        (folder / f"{name}.txt").write_text(f"picture {name}")
    caption_or_check(parse_args(["--image_dir", str(folder), "--model", "no/such-captioner"]))
    said = capsys.readouterr().out
    assert "pictures with a text file beside them: 4;" in said and "all 4 pictures" in said
    assert [row.captions[0] for row in read_captions(folder)][2:] == ["picture c", "picture d"]
