"""caption_file.py: rows are kept or replaced in place, what was broken off goes on, and nothing is written over."""

import json
import os
from pathlib import Path

import pytest

from captioning.caption_file import KeptRows, ReplacedRows, caption_file, remove_partial_caption_files
from data.metadata import read_existing_captions
from data.metadata_writer import append_captions
from runtime.errors import UserError, WorkError

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


def open_file(folder: Path, output: Path | None = None, recursive: bool = False):
    return caption_file(folder, output, recursive)


def names(file, paths) -> list[str]:
    return [file.name_of(path) for path in paths]


def all_names(*where: object) -> list[str]:
    file = open_file(*where)
    return names(file, file.pictures())


def test_names_are_from_the_folder_but_in_a_metadata_file_above_it_from_there(folder, monkeypatch):
    sub = folder / "sub"
    assert all_names(sub) == ["d.jpg"]
    assert all_names(folder, None, True) == ["a.jpg", "b.PNG", "c.webp", "sub/d.jpg"]
    assert all_names(sub, folder / "metadata.jsonl") == ["sub/d.jpg"]
    assert all_names(sub, folder / "captions.jsonl") == ["d.jpg"]
    monkeypatch.chdir(sub)
    assert all_names(Path("."), folder / "metadata.jsonl") == ["sub/d.jpg"]
    assert all_names(sub, Path("metadata.jsonl")) == ["d.jpg"]
    with pytest.raises(UserError, match="--output .*: a folder"):
        open_file(folder, sub)


def test_kept_rows_stay_byte_for_byte_with_the_files_own_line_ends(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    with KeptRows(file := open_file(folder)) as writer:
        assert names(file, writer.pending()) == ["c.webp"]
        writer.add({"c.webp": "ours é"})
    content = (folder / "metadata.jsonl").read_bytes()
    assert content == ROWS + b'\r\n{"file_name": "c.webp", "text": "ours \xc3\xa9"}\r\n'
    assert KeptRows(file).pending() == []


def test_replaced_captions_change_no_other_byte_and_the_old_file_is_kept(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    (folder / "metadata.jsonl.backup-1").write_text("an earlier one")
    with ReplacedRows(file := open_file(folder)) as writer:
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
    with ReplacedRows(open_file(folder)) as writer:
        writer.add({"a.jpg": "new"})
    assert (folder / "metadata.jsonl").read_text() == replaced
    assert json.loads(replaced)["text"] == "new"


def test_a_replacement_that_was_broken_off_goes_on_and_one_with_other_settings_begins_anew(folder):
    (folder / "metadata.jsonl").write_bytes(ROWS)
    file, settings = open_file(folder), {"model": "one"}
    with ReplacedRows(file, settings=settings) as writer:
        writer.add({"a.jpg": "new"})
    again = ReplacedRows(file, settings=settings)
    assert names(file, again.pending()) == ["b.PNG", "c.webp"]
    assert again.goes_on and again.backups == ["metadata.jsonl.backup-1"]
    other = ReplacedRows(file, settings={"model": "two"})
    assert len(other.pending()) == 3 and other.backups == ["metadata.jsonl.backup-2"]
    assert b'"new"' in (folder / "metadata.jsonl.backup-2").read_bytes()
    other.finish()
    assert len(ReplacedRows(file, settings={"model": "two"}).pending()) == 3
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_what_was_corrected_by_hand_during_a_replacement_is_kept_and_the_replacement_goes_on(folder):
    path = folder / "metadata.jsonl"
    path.write_bytes(ROWS)
    with ReplacedRows(file := open_file(folder)) as writer:
        writer.add({"a.jpg": "new"})
    corrected = path.read_bytes().replace(b'"new"', b'"by hand"')
    path.write_bytes(corrected)
    with ReplacedRows(file) as again:
        assert names(file, again.pending()) == ["b.PNG", "c.webp"]
        assert again.goes_on and again.backups == ["metadata.jsonl.backup-1", "metadata.jsonl.backup-2"]
        assert (folder / "metadata.jsonl.backup-2").read_bytes() == corrected
        again.add({"b.PNG": "new"})
        while_it_runs = path.read_bytes().replace(b'"new"', b'"by hand too"')
        path.write_bytes(while_it_runs)
        again.add({"c.webp": "new"})
    assert (folder / "metadata.jsonl.backup-3").read_bytes() == while_it_runs
    assert b'"by hand"' in path.read_bytes() and b'"by hand too"' in path.read_bytes()
    assert not ReplacedRows(file).pending() and len(list(folder.glob("*.backup-*"))) == 3


def test_a_row_that_is_removed_during_a_replacement_is_made_again(folder):
    with ReplacedRows(file := open_file(folder)) as writer:
        writer.add({"a.jpg": "new", "b.PNG": "new"})
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text(lines[1])
    assert names(file, ReplacedRows(file).pending()) == ["a.jpg", "c.webp"]


def test_a_row_that_somebody_adds_meanwhile_is_left_alone(folder):
    told = []
    with KeptRows(open_file(folder), told.extend) as writer:
        pending = writer.pending()
        append_captions(folder, [("a.jpg", "mine")])
        writer.add(dict.fromkeys(names(writer.file, pending), "ours"))
    rows = {row.file_name: row.captions for row in read_existing_captions(folder)}
    assert rows == {"a.jpg": ("mine",), "b.PNG": ("ours",), "c.webp": ("ours",)}
    assert told == ["b.PNG", "c.webp"]


def test_a_folder_without_captions_has_nothing_to_back_up(folder):
    with ReplacedRows(file := open_file(folder)) as writer:
        writer.add({"a.jpg": "new"})
    writer.finish()
    assert sorted(path.name for path in folder.glob("*metadata*")) == ["metadata.jsonl"]
    assert names(file, KeptRows(file).pending()) == ["b.PNG", "c.webp"]


def test_each_caption_is_told_once_it_is_in_the_file(folder):
    told = []

    def written(captions):
        in_file = {row.file_name for row in read_existing_captions(folder)}
        assert set(captions) <= in_file
        told.extend(captions)

    with KeptRows(open_file(folder), written) as writer:
        for name in ("a.jpg", "b.PNG", "c.webp"):
            writer.add({name: "new"})
        assert told[:1] == ["a.jpg"]  # the first at once, the others when it is worth it
    assert told == ["a.jpg", "b.PNG", "c.webp"]


def test_what_waits_is_written_also_when_the_work_fails(folder):
    with pytest.raises(KeyboardInterrupt), KeptRows(file := open_file(folder)) as writer:
        writer.add({"a.jpg": "one"})
        writer.add({"b.PNG": "two"})
        raise KeyboardInterrupt
    assert [row.file_name for row in file.rows()] == ["a.jpg", "b.PNG"]


def test_half_written_files_of_a_killed_run_are_removed_and_no_others(folder):
    ours = [".metadata.jsonl.host.1.part", "..metadata.jsonl.replacing.host.1.part"]
    others = [".metadata.jsonl.lock.host.2.part", ".other.jsonl.host.1.part", "metadata.jsonl.part"]
    for name in [*ours, *others]:
        (folder / name).touch()
    remove_partial_caption_files(open_file(folder))
    assert {path.name for path in folder.glob("*.part")} | {path.name for path in folder.glob(".*.part")} == set(
        others
    )


def test_half_written_files_of_what_a_link_leads_to_are_removed_too(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "captions of mine").touch()
    (folder / "metadata.jsonl").symlink_to(elsewhere / "captions of mine")
    (elsewhere / ".captions of mine.host.1.part").touch()
    (elsewhere / ".metadata.jsonl.host.1.part").touch()  # of another file
    remove_partial_caption_files(open_file(folder))
    assert sorted(path.name for path in elsewhere.iterdir()) == [".metadata.jsonl.host.1.part", "captions of mine"]


def test_where_nothing_can_be_written_is_one_line(folder):
    with pytest.raises(WorkError, match="cannot write /proc/captions.jsonl"):
        KeptRows(open_file(folder, Path("/proc/captions.jsonl"))).add({"a.jpg": "new"})
