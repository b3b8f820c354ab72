"""metadata.jsonl: rows are read and checked all at once, and every fault is named with its line."""

import json
from pathlib import Path

import pytest

from data.metadata import read_captions, read_existing_captions, scan_rows
from runtime.errors import UserError


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


def test_another_file_has_names_relative_to_the_pictures_unless_it_is_a_metadata_jsonl_further_up(tmp_path):
    pictures, elsewhere = tmp_path / "up" / "pictures", tmp_path / "captions.jsonl"
    pictures.mkdir(parents=True)
    (pictures / "a.jpg").write_bytes(b"a picture")
    elsewhere.write_text(json.dumps({"file_name": "a.jpg", "text": "a"}))
    above = tmp_path / "up" / "metadata.jsonl"
    above.write_text(json.dumps({"file_name": "pictures/a.jpg", "text": "a"}))
    for path in (elsewhere, above):
        assert [row.file_name for row in read_captions(pictures, path=path)] == ["a.jpg"]
    above.write_text(json.dumps({"file_name": "a.jpg", "text": "a"}))
    with pytest.raises(UserError, match="line 1: .*a.jpg.* is not in .*pictures/"):
        read_captions(pictures, path=above)
    elsewhere.write_text("{")
    with pytest.raises(UserError, match="captions.jsonl, line 1: not JSON"):
        read_captions(pictures, path=elsewhere)
    with pytest.raises(UserError, match="--metadata_file .*none.jsonl: no such file"):
        read_captions(pictures, path=tmp_path / "none.jsonl")


def test_where_the_folder_cannot_be_written_captions_are_to_go_elsewhere(folder, monkeypatch):
    monkeypatch.setattr("data.metadata.os.access", lambda path, mode: False)
    assert "--output FILE" in refusal(folder) and "--metadata_file FILE" in refusal(folder)


def test_a_folder_without_metadata_has_no_rows_yet(folder):
    assert read_existing_captions(folder) == []


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
