"""Captions are added or replaced in place, an interrupted replacement is resumed, and no work by hand is lost."""

import json
import os
from pathlib import Path

import pytest

from captioning.caption_file import CaptionFile, locate_caption_file
from captioning.caption_writers import CaptionWriter, ReplacingCaptionWriter
from metadata.reading import read_captions
from metadata.writer import append_captions
from runtime.errors import WorkError

ROWS = (
    b'\xef\xbb\xbf{ "text" : "mine\\u00e9" ,"file_name":"a.jpg", "score": 1.0e3}\r\n\r\n'
    b'{"file_name":"gone.jpg","text":"of no picture"}\r\n{"tags": ["x"], "file_name": "b.PNG"}'
)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.webp", "sub/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def locate(folder: Path, output: Path | None = None, recursive: bool = False) -> CaptionFile:
    return locate_caption_file(folder, output, recursive)


def names(file, paths) -> list[str]:
    return [file.name_of(path) for path in paths]


def test_kept_rows_stay_byte_for_byte_with_the_files_own_line_ends(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    with CaptionWriter(file := locate(folder)) as writer:
        assert names(file, writer.pending()) == ["c.webp"]
        writer.add({"c.webp": "ours é"})
    content = (folder / "metadata.jsonl").read_bytes()
    assert content == ROWS + b'\r\n{"file_name": "c.webp", "text": "ours \xc3\xa9"}\r\n'
    assert CaptionWriter(file).pending() == []


def test_replaced_captions_change_no_other_byte_and_the_old_file_is_kept(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    (folder / "metadata.jsonl.backup-1").write_text("an earlier one")
    with ReplacingCaptionWriter(file := locate(folder)) as writer:
        assert names(file, writer.pending()) == ["a.jpg", "b.PNG", "c.webp"]
        writer.add({"a.jpg": 'new "é"', "c.webp": "added"})
        writer.add({"b.PNG": "of b"})
    expected = ROWS.replace(b'"mine\\u00e9"', b'"new \\"\xc3\xa9\\""').replace(
        b'"b.PNG"}', b'"b.PNG", "text": "of b"}'
    )
    assert (folder / "metadata.jsonl").read_bytes() == expected + b'\r\n{"file_name": "c.webp", "text": "added"}\r\n'
    assert (folder / "metadata.jsonl.backup-1").read_text() == "an earlier one"
    assert writer.backups == ["metadata.jsonl.backup-2"]
    assert (folder / "metadata.jsonl.backup-2").read_bytes() == ROWS


@pytest.mark.parametrize(
    ("row", "replaced"),
    [
        ('{"file_name":"a.jpg","text":"old"}', '{"file_name":"a.jpg","text":"new"}'),
        ('{"text": ["old", "older"], "file_name": "a.jpg"}', '{"text": "new", "file_name": "a.jpg"}'),
        ('{"x": {"text": "old"}, "text": null, "file_name": "./a.jpg"}',
         '{"x": {"text": "old"}, "text": "new", "file_name": "./a.jpg"}'),
        ('{"text": "1", "text": "2", "file_name": "a.jpg"}', '{"text": "1", "text": "new", "file_name": "a.jpg"}'),
        (' { "file_name" : "a.jpg" , "n": 1.50, "b":"}" } ',
         ' { "file_name" : "a.jpg" , "n": 1.50, "b":"}" , "text": "new"} '),
        ('{"file_name": "a.jpg", "t\\u0065xt": "old"}', '{"file_name": "a.jpg", "t\\u0065xt": "new"}'),
    ],
)  # fmt: skip
def test_only_the_captions_bytes_of_a_row_change(folder, row, replaced):
    (folder / "metadata.jsonl").write_text(row)
    with ReplacingCaptionWriter(locate(folder)) as writer:
        writer.add({"a.jpg": "new"})
    assert (folder / "metadata.jsonl").read_text() == replaced
    assert json.loads(replaced)["text"] == "new"


def test_a_replacement_that_was_broken_off_resumed_and_one_with_other_settings_begins_anew(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    file, settings = locate(folder), {"model": "one"}
    with ReplacingCaptionWriter(file, settings=settings) as writer:
        writer.add({"a.jpg": "new"})
    again = ReplacingCaptionWriter(file, settings=settings)
    assert names(file, again.pending()) == ["b.PNG", "c.webp"]
    assert again.resumed and again.backups == ["metadata.jsonl.backup-1"]
    other = ReplacingCaptionWriter(file, settings={"model": "two"})
    assert len(other.pending()) == 3 and other.backups == ["metadata.jsonl.backup-2"]
    assert b'"new"' in (folder / "metadata.jsonl.backup-2").read_bytes()
    other.finish()
    assert len(ReplacingCaptionWriter(file, settings={"model": "two"}).pending()) == 3
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_what_was_corrected_by_hand_during_a_replacement_is_kept_and_the_replacement_resumed(folder):
    path = folder / "metadata.jsonl"
    path.write_bytes(ROWS)
    with ReplacingCaptionWriter(file := locate(folder)) as writer:
        writer.add({"a.jpg": "new"})
    corrected = path.read_bytes().replace(b'"new"', b'"by hand"')
    path.write_bytes(corrected)
    with ReplacingCaptionWriter(file) as again:
        assert names(file, again.pending()) == ["b.PNG", "c.webp"]
        assert again.resumed and again.backups == ["metadata.jsonl.backup-1", "metadata.jsonl.backup-2"]
        assert (folder / "metadata.jsonl.backup-2").read_bytes() == corrected
        again.add({"b.PNG": "new"})
        while_it_runs = path.read_bytes().replace(b'"new"', b'"by hand too"')
        path.write_bytes(while_it_runs)
        again.add({"c.webp": "new"})
    assert (folder / "metadata.jsonl.backup-3").read_bytes() == while_it_runs
    assert b'"by hand"' in path.read_bytes() and b'"by hand too"' in path.read_bytes()
    assert not ReplacingCaptionWriter(file).pending() and len(list(folder.glob("*.backup-*"))) == 3


def test_a_row_that_is_removed_during_a_replacement_is_made_again(folder):
    with ReplacingCaptionWriter(file := locate(folder)) as writer:
        writer.add({"a.jpg": "new", "b.PNG": "new"})
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text(lines[1])
    assert names(file, ReplacingCaptionWriter(file).pending()) == ["a.jpg", "c.webp"]


def test_a_row_that_somebody_adds_meanwhile_is_left_alone(folder):
    reported = []
    with CaptionWriter(locate(folder), reported.extend) as writer:
        pending = writer.pending()
        append_captions(folder, [("a.jpg", "mine")])
        writer.add(dict.fromkeys(names(writer.file, pending), "ours"))
    rows = {row.file_name: row.captions for row in read_captions(folder)}
    assert rows == {"a.jpg": ("mine",), "b.PNG": ("ours",), "c.webp": ("ours",)}
    assert reported == ["b.PNG", "c.webp"]


def test_a_folder_without_captions_has_nothing_to_back_up(folder):
    with ReplacingCaptionWriter(file := locate(folder)) as writer:
        writer.add({"a.jpg": "new"})
    writer.finish()
    assert sorted(path.name for path in folder.glob("*metadata*")) == ["metadata.jsonl"]
    assert names(file, CaptionWriter(file).pending()) == ["b.PNG", "c.webp"]


def test_each_caption_is_reported_once_it_is_in_the_file(folder):
    reported = []

    def on_written(captions):
        in_file = {row.file_name for row in read_captions(folder)}
        assert set(captions) <= in_file
        reported.extend(captions)

    with CaptionWriter(locate(folder), on_written) as writer:
        for name in ("a.jpg", "b.PNG", "c.webp"):
            writer.add({name: "new"})
        assert reported[:1] == ["a.jpg"]  # the first at once, the others when it is worth it
    assert reported == ["a.jpg", "b.PNG", "c.webp"]


def test_what_waits_is_written_also_when_the_work_fails(folder):
    with pytest.raises(KeyboardInterrupt), CaptionWriter(file := locate(folder)) as writer:
        writer.add({"a.jpg": "one"})
        writer.add({"b.PNG": "two"})
        raise KeyboardInterrupt
    assert [row.file_name for row in file.rows()] == ["a.jpg", "b.PNG"]


def test_where_nothing_can_be_written_is_one_line(folder):
    with pytest.raises(WorkError, match="cannot write /proc/captions.jsonl"):
        CaptionWriter(locate(folder, Path("/proc/captions.jsonl"))).add({"a.jpg": "new"})
