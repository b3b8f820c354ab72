"""Text files beside pictures: which belongs to which picture, what it says, and which rows say something else."""

from pathlib import Path

import pytest

from metadata.sidecars import Sidecars, find_differing_sidecars, find_distant_sidecars
from runtime.errors import UserError


def captions_of(picture: Path) -> tuple[str, ...]:
    sidecar = Sidecars().read(picture)
    return sidecar.captions if sidecar else ()


def test_each_line_is_a_caption(tmp_path):
    (tmp_path / "a.txt").write_text("a blue pair of jeans\n", encoding="utf-8-sig")
    (tmp_path / "b.caption").write_bytes("jeans,  from the back\r\nein Paar Jeans für Änne\r\n".encode())
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "c.caption").write_text("jeans\u2028seen from the back", encoding="utf-8")
    assert captions_of(tmp_path / "a.jpg") == ("a blue pair of jeans",)
    assert captions_of(tmp_path / "b.PNG") == ("jeans, from the back", "ein Paar Jeans für Änne")
    assert captions_of(tmp_path / "c.jpg") == ("jeans seen from the back",)
    assert captions_of(tmp_path / "d.jpg") == captions_of(tmp_path / f"{'x' * 250}.jpg") == ()


def test_paragraphs_are_one_caption(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"A backpack.\r\n\r\nIt stands on a table.\r\n \r\nThere is a wall.\r\n\r\n")
    sidecar = Sidecars().read(tmp_path / "c.jpg")
    assert sidecar.captions == ("A backpack. It stands on a table. There is a wall.",) and sidecar.joined
    (tmp_path / "d.txt").write_text("\n\none line\n\n")
    assert not Sidecars().read(tmp_path / "d.jpg").joined


@pytest.mark.parametrize(
    ("text_file", "picture"),
    [
        ("IMG_1.TXT", "IMG_1.JPG"),
        ("img_1.txt", "IMG_1.JPG"),
        ("b.jpg.txt", "b.jpg"),
        ("b.JPG.Caption", "b.jpg"),
        ("d.v1.txt", "d.v1.jpg"),
        ("cafe\u0301.txt", "caf\xe9.jpg"),
    ],
)
def test_a_text_file_is_found_whatever_the_case_and_form_of_its_name(tmp_path, text_file, picture):
    (tmp_path / text_file).write_text("a dog")
    assert captions_of(tmp_path / picture) == ("a dog",)
    assert captions_of(tmp_path / "other.jpg") == ()


def test_the_name_that_fits_best_counts(tmp_path):
    for name in ("b.txt", "B.txt", "b.jpg.txt"):
        (tmp_path / name).write_text(name)
    assert [captions_of(tmp_path / name) for name in ("b.jpg", "b.png", "B.png")] == [
        ("b.jpg.txt",), ("b.txt",), ("B.txt",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("für".encode("latin-1"), r"not UTF-8 \(byte 2\)"),
        ("dog".encode("utf-16-le"), "UTF-16"),
        ("dog".encode("utf-16-be"), "UTF-16"),
        ("dog".encode("utf-16"), "UTF-16"),
    ],
)
def test_one_that_is_not_utf_8_is_named(tmp_path, content, complaint):
    (tmp_path / "d.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"d\.txt: {complaint}"):
        Sidecars().read(tmp_path / "d.jpg")


def differing(folder: Path, rows: dict[str, list[str]]) -> list[str]:
    return [path.name for path in find_differing_sidecars((folder / name, row) for name, row in rows.items())]


def test_one_that_was_edited_since_it_became_a_row_is_found(tmp_path):
    for name, text in {"a.txt": "new", "b.txt": "a  dog\n", "c.txt": "one.\n\ntwo.", "d.txt": "x\ny"}.items():
        (tmp_path / name).write_text(text)
    rows = {"a.jpg": ["old"], "b.jpg": ["a dog"], "c.jpg": ["one.", "two."], "d.jpg": ["x", "y"], "e.jpg": ["z"]}
    assert differing(tmp_path, rows) == ["a.txt"]
    assert differing(tmp_path, {**rows, "a.jpg": []}) == []  # a row to be filled


def test_a_trigger_before_most_rows_is_no_edit_and_a_tag_taken_from_one_file_is(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"dog {number}\na dog")
    triggered = {f"{number}.jpg": [f"sks, dog {number}", "sks, a dog"] for number in range(4)}
    assert differing(tmp_path, triggered) == []
    plain = {f"{number}.jpg": [f"dog {number}", "a dog"] for number in range(4)}
    assert differing(tmp_path, {**plain, "2.jpg": ["best, dog 2", "best, a dog"]}) == ["2.txt"]


def test_one_that_cannot_be_read_is_named_where_there_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("für".encode("latin-1"))
    assert differing(tmp_path, {"a.jpg": ["für"]}) == ["a.txt"]


def test_text_files_of_a_picture_in_another_folder_are_found(tmp_path):
    for name in ("a.jpg", "b.jpg", "cats/a.jpg", "cats/a.txt", "captions/B.txt", "labels/b.txt", "texts/b.caption"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a dog")
    (tmp_path / "labels/b.txt").write_text("0 0.5 0.5 0.25 0.3")
    found = find_distant_sidecars(tmp_path, [tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert found == [tmp_path / "captions/B.txt", tmp_path / "texts/b.caption"]  # cats/a.txt is that of cats/a.jpg


def test_boxes_of_an_object_detector_are_no_caption(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.25 0.3\n12 0.481719 .634028 0.690625 0.713278\n")
    with pytest.raises(UserError, match="a.txt: boxes"):
        captions_of(tmp_path / "a.jpg")
    (tmp_path / "b.txt").write_text("501 2024")
    assert captions_of(tmp_path / "b.jpg") == ("501 2024",)
