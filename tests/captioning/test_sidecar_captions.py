"""Captions in text files beside the pictures become rows: which, when, and in place of what."""

import pytest
from PIL import Image

from img_captioning import caption_or_check, parse_args
from metadata.reading import read_captions
from runtime.errors import UserError, WorkError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.jpg", "d.jpg"):
        Image.new("RGB", (40, 60), (10, 20, len(name))).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a blue pair of jeans\n", encoding="utf-8-sig")
    (tmp_path / "b.caption").write_bytes("jeans,  from the back\r\nein Paar Jeans für Änne\r\n".encode())
    (tmp_path / "c.txt").write_text(" \n")
    return tmp_path


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


def test_a_replacement_writes_nothing_where_its_captioner_is_not_there(folder):
    with pytest.raises(UserError, match="no/such-captioner"):
        run(folder, "--existing", "replace")
    assert not (folder / "metadata.jsonl").exists()


def run(folder, *flags: str) -> None:
    caption_or_check(parse_args(["--image_dir", str(folder), "--model", "no/such-captioner", *flags]))


def captions_of(folder) -> dict[str, tuple[str, ...]]:
    return {row.file_name: row.captions for row in read_captions(folder)}


@pytest.fixture
def edited(folder, capsys):
    """All rows are from text files, of which one was edited since."""
    for name in "cd":
        (folder / f"{name}.txt").write_text(f"picture {name}")
    run(folder)
    (folder / "c.txt").write_text("corrected")
    capsys.readouterr()
    return folder


def test_an_edited_one_is_named_and_its_row_stays(edited, capsys):
    before = (edited / "metadata.jsonl").read_bytes()
    for flags in ([], ["--existing", "fill"]):
        run(edited, *flags)
        said = capsys.readouterr().out
        assert "differ" in said and "c.txt" in said and "a.txt" not in said
    with pytest.raises(WorkError):
        run(edited, "--check")
    assert (edited / "metadata.jsonl").read_bytes() == before


def test_a_replacement_takes_an_edited_one_and_keeps_the_old_rows(edited, capsys):
    before = (edited / "metadata.jsonl").read_bytes()
    run(edited, "--existing", "replace")
    assert captions_of(edited)["c.jpg"] == ("corrected",) and "c.txt" not in capsys.readouterr().out
    assert (edited / "metadata.jsonl.backup-1").read_bytes() == before
    assert sorted(path.name for path in edited.glob("*.jsonl*")) == ["metadata.jsonl", "metadata.jsonl.backup-1"]
    assert not list(edited.glob(".*"))


def test_what_was_understood_is_printed(folder, capsys):
    (folder / "c.txt").write_text("A jeans.\n\nIt is blue.")
    (folder / "d.txt").write_text("plain")
    run(folder)
    said = capsys.readouterr().out
    assert "paragraphs of one caption: 1 (c.txt)" in said and "one a line: 1 (b.caption)" in said
    assert captions_of(folder)["c.jpg"] == ("A jeans. It is blue.",)


def test_one_of_other_bytes_is_refused_before_a_row_is_written(folder):
    (folder / "d.txt").write_bytes("dog".encode("utf-16-le"))
    with pytest.raises(UserError, match="d.txt: UTF-16"):
        run(folder)
    assert not (folder / "metadata.jsonl").exists()


def test_where_all_pictures_have_one_no_captioner_is_loaded(folder, capsys):
    for name in "cd":
        (folder / f"{name}.txt").write_text(f"picture {name}")
    caption_or_check(parse_args(["--image_dir", str(folder), "--model", "no/such-captioner"]))
    said = capsys.readouterr().out
    assert "pictures with a text file beside them: 4;" in said and "all 4 pictures" in said
    assert [row.captions[0] for row in read_captions(folder)][2:] == ["picture c", "picture d"]


def test_captions_in_another_folder_are_named_before_a_captioner_writes_others(folder):
    (folder / "captions").mkdir()
    (folder / "captions" / "d.txt").write_text("a shirt")
    with pytest.raises(UserError, match="d.txt.*move them beside the pictures"):
        caption_or_check(parse_args(["--image_dir", str(folder)]))
    assert not (folder / "metadata.jsonl").exists()
    with pytest.raises(WorkError):
        caption_or_check(parse_args(["--image_dir", str(folder), "--check"]))
