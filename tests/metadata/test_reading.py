"""metadata.jsonl: rows are read and checked all at once, and every fault is named with its line."""

import json
from pathlib import Path

import pytest

from metadata.files import MetadataFile, find_metadata_files
from metadata.reading import describe_captions, read_captions, scan_rows
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
        ({"file_name": "out/a.jpg", "text": "t"}, "is a link out of the folder"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(folder, tmp_path_factory, row, complaint):
    (folder / "empty.jpg").touch()
    (folder / "away.jpg").symlink_to("/etc/hostname")
    (elsewhere := tmp_path_factory.mktemp("elsewhere")).joinpath("a.jpg").write_bytes(b"-")
    (folder / "out").symlink_to(elsewhere)
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
        assert names_of(pictures, named=path) == ["a.jpg"]
    above.write_text(json.dumps({"file_name": "a.jpg", "text": "a"}))
    with pytest.raises(UserError, match="line 1: .*a.jpg.* is not in .*pictures/"):
        names_of(pictures, named=above)
    elsewhere.write_text("{")
    with pytest.raises(UserError, match="captions.jsonl, line 1: not JSON"):
        names_of(pictures, named=elsewhere)
    with pytest.raises(UserError, match="--metadata_file .*none.jsonl: no such file"):
        names_of(pictures, named=tmp_path / "none.jsonl")


def test_of_a_named_file_training_reads_nothing_else_and_says_so(tmp_path, folder):
    write(folder, {"file_name": "a.jpg", "text": "a"})
    (folder / "dogs").mkdir()
    write(folder / "dogs", {"file_name": "1.jpg", "text": "a dog"})
    elsewhere = tmp_path / "mine.csv"
    elsewhere.write_text("file_name,text\nb.PNG,mine\n")
    assert names_of(folder, named=elsewhere) == ["b.PNG"]
    sources = describe_captions(folder, find_metadata_files(folder, named=elsewhere), [])
    assert sources.elsewhere == [str(elsewhere)] and sources.not_read == ["metadata.jsonl", "dogs/metadata.jsonl"]


def test_a_metadata_csv_that_is_named_is_read_and_the_jsonl_beside_it_is_not(folder):
    write(folder, {"file_name": "a.jpg", "text": "a"})
    (folder / "metadata.csv").write_text("file_name,text\nb.PNG,mine\n")
    [file] = files = find_metadata_files(folder, named=folder / "metadata.csv")
    sources = describe_captions(folder, files, [])
    assert sources.elsewhere == [str(file.path)] and sources.not_read == ["metadata.jsonl"]


def test_a_folder_in_place_of_the_metadata_file_is_called_one(folder):
    (folder / "metadata.jsonl").mkdir()
    for settings in ({}, {"named": folder / "metadata.jsonl"}):
        with pytest.raises(UserError, match="metadata.jsonl.* a folder"):
            names_of(folder, **settings)


def test_a_csv_file_without_rows_is_not_to_be_filled_by_the_captioner_which_never_writes_it(folder, tmp_path_factory):
    (folder / "metadata.csv").write_text("file_name,text\n")
    assert "by hand, or move it away" in refusal(folder)
    elsewhere = tmp_path_factory.mktemp("captions") / "mine.csv"
    for content in (None, "file_name,text\n"):
        if content:
            elsewhere.write_text(content)
        with pytest.raises(UserError, match='--output ".*mine.jsonl", and train with --metadata_file ".*mine.jsonl"'):
            names_of(folder, named=elsewhere)
    (folder / "metadata.csv").rename(folder / "mine.csv")
    (folder / "dogs").mkdir()
    write(folder / "dogs")
    assert f'--image_dir "{folder / "dogs"}"' in refusal(folder)  # there the captions are to go


def test_where_the_folder_cannot_be_written_captions_are_to_go_elsewhere(folder, monkeypatch):
    monkeypatch.setattr("metadata.reading.os.access", lambda path, mode: False)
    assert "--output FILE" in refusal(folder) and "--metadata_file FILE" in refusal(folder)


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


# --- metadata.csv, and what only looks like a metadata file ---------------------------------------------------------


CSV = 'file_name,text,n\na.jpg,"a dog, sitting\nin the grass",1\n\nb.PNG,"a ""big"" cat",2\n'


def test_a_csv_file_is_read_as_imagefolder_reads_it(folder, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    rows = read_captions(folder)
    assert [(row.file_name, row.line) for row in rows] == [("a.jpg", 2), ("b.PNG", 5)]
    split = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    assert [row.captions[0] for row in rows] == split["text"] == ["a dog, sitting\nin the grass", 'a "big" cat']


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("file_name,text\na.jpg,a dog, sitting\n", "metadata.csv, line 2: 3 values for 2 columns"),
        ("file_name,text\na.jpg,a dog\nb.PNG,\n", "metadata.csv, line 3: `text` is empty"),
        ("file_name,text\na.jpg\n", "metadata.csv, line 2: `text` must be"),
        ('file_name,text\na.jpg,"a dog\n', "metadata.csv, line 2: not CSV"),
        ("file_name;text\na.jpg;a dog\n", "file_name;text"),
        ("a.jpg,a dog\n", "columns file_name and text"),
        ("file_name,caption\na.jpg,a dog\n", "--caption_column caption"),
        ("file_name,text,text\na.jpg,a dog,a cat\n", '"text" twice'),
        ("file_name,text\na.jpg,caf\xe9\n".encode("latin-1"), "metadata.csv: not UTF-8"),
        ("file_name,text\na.jpg,a dog\n".encode("utf-16"), "metadata.csv: UTF-16"),
    ],
)
def test_a_csv_file_that_is_not_right_is_refused_with_the_line(folder, content, complaint):
    (folder / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["Metadata.jsonl", "metadata.json", "metadata.jsonl.txt", "METADATA.CSV", "meta_data.jsonl", "metadata (1).jsonl"]
    + ["captions.csv", "Captions.txt", "annotations.json", "caption.jsonl"],
)
def test_a_near_miss_of_the_metadata_file_is_named(folder, name):
    (folder / name).write_text("{}")
    right = "metadata.jsonl" if "json" in name else "metadata.csv"
    assert name in refusal(folder) and f"rename it to {right}" in refusal(folder)
    write(folder, {"file_name": "a.jpg", "text": "a dog"})
    assert len(read_captions(folder)) == 1


def test_text_files_in_another_folder_than_their_pictures_are_named(folder):
    (folder / "captions").mkdir()
    (folder / "captions" / "a.txt").write_text("a dog")
    assert "1 text file" in refusal(folder) and str(Path("captions", "a.txt")) in refusal(folder)
    (folder / "a.txt").write_text("mine")  # a.jpg has its own
    assert "no metadata.jsonl" in refusal(folder)


def test_a_folder_as_metadata_file_is_named(folder):
    with pytest.raises(UserError, match="--metadata_file .*: a folder"):
        read_captions(folder, files=[MetadataFile(folder, folder)])


def test_other_files_are_no_near_misses(folder):
    for name in ("metadata.jsonl.backup-1", "notes.json", "images.jsonl", ".metadata.jsonl.lock", "captions.txt"):
        (folder / name).touch()
    (folder / "captions.jpg").touch()  # which captions.txt is the caption of
    assert "no metadata.jsonl" in refusal(folder)


@pytest.mark.parametrize("lines", [['[{"file_name": "a.jpg"},', "{}]"], ["[", "{}", "]"], ["{", '"file_name": 1}']])
def test_json_that_is_not_in_lines_is_one_message(folder, lines):
    write(folder, *lines)
    assert "a row in each line" in refusal(folder) and "bad row" not in refusal(folder)


def test_utf_16_is_one_message_that_names_the_file(folder):
    (folder / "metadata.jsonl").write_bytes('{"file_name": "a.jpg", "text": "a"}\n'.encode("utf-16-le"))
    assert "metadata.jsonl: UTF-16" in refusal(folder)


def test_text_files_are_mentioned_where_rows_are_missing(folder):
    (folder / "A.TXT").write_text("a dog")
    assert "1 of 4 have a text file" in refusal(folder)


# --- another key ----------------------------------------------------------------------------------------------------


def test_another_key_that_holds_the_caption_is_named(folder):
    write(folder, {"file_name": "a.jpg", "caption": "a dog"}, {"file_name": "b.PNG", "what": "a", "tags": "b"})
    message = refusal(folder)
    assert "line 1" in message and "--caption_column caption" in message and "--caption_column tags" in message
    assert [row.other_column for row in scan_rows(folder / "metadata.jsonl", folder)] == ["caption", "tags"]
    write(folder, {"file_name": "a.jpg", "text": "", "caption": "a dog"}, {"file_name": "b.PNG", "x": "1", "y": "2"})
    assert "--caption_column" not in refusal(folder)
    assert [row.is_empty for row in scan_rows(folder / "metadata.jsonl", folder)] == [True, True]


# --- sub-folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(folder):
    """Pictures in the folder and in three sub-folders; all but one sub-folder have rows of their own."""
    for name in ("dogs", "cans", "validation"):
        (folder / name).mkdir()
        (folder / name / "1.jpg").write_bytes(b"a picture")
        write(folder / name, {"file_name": "1.jpg", "text": f"{name}"})
    return folder


def names_of(folder: Path, **settings) -> list[str]:
    return [row.file_name for row in read_captions(folder, files=find_metadata_files(folder, **settings))]


def test_rows_of_sub_folders_are_read_as_imagefolder_reads_them(nested, tmp_path_factory):
    assert names_of(nested) == ["cans/1.jpg", "dogs/1.jpg"]
    write(nested, {"file_name": "a.jpg", "text": "a"})
    assert names_of(nested) == ["a.jpg", "cans/1.jpg", "dogs/1.jpg"]
    assert names_of(nested, leave_out=nested / "cans") == ["a.jpg", "dogs/1.jpg"]
    sources = describe_captions(nested, find_metadata_files(nested), [])
    assert sources.sub_folders == ["cans", "dogs"] and sources.not_read == ["validation/"] and not sources.elsewhere


def test_all_captions_that_are_not_read_are_named_wherever_they_are(nested):
    for name in ("dogs/test", "dogs/more", "mine/validation"):
        (nested / name).mkdir(parents=True)
        write(nested / name, {"file_name": "1.jpg", "text": "x"})
    (nested / "dogs" / "more" / "metadata.csv").touch()
    (nested / "metadata.json").touch()
    files = find_metadata_files(nested, leave_out=nested / "validation")
    assert describe_captions(nested, files, [], leave_out=nested / "validation").not_read == [
        "metadata.json", "dogs/more/metadata.csv", "dogs/test/", "mine/validation/",
    ]  # fmt: skip


def test_faults_of_sub_folders_are_named_with_the_sub_folder(nested):
    write(nested / "dogs", {"file_name": "../a.jpg", "text": "a"}, {"file_name": "2.jpg", "text": "a"})
    assert "dogs/metadata.jsonl, line 1: `file_name` must stay" in refusal(nested)
    assert 'dogs/metadata.jsonl, line 2: the picture "dogs/2.jpg" is missing' in refusal(nested)


def test_a_picture_may_have_the_same_caption_in_two_files_and_no_other(nested):
    write(nested, {"file_name": "dogs/1.jpg", "text": "dogs"})
    assert names_of(nested) == ["dogs/1.jpg", "cans/1.jpg"]
    write(nested, {"file_name": "dogs/1.jpg", "text": "another"})
    message = refusal(nested)
    assert "dogs/metadata.jsonl, line 1" in message and "another caption in metadata.jsonl, line 1" in message


def test_a_csv_file_beside_a_jsonl_file_is_not_read_and_said_so(folder):
    write(folder, {"file_name": "a.jpg", "text": "mine"})
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,theirs\n")
    assert [row.captions for row in read_captions(folder)] == [("mine",)]
    assert describe_captions(folder, find_metadata_files(folder), []).not_read == ["metadata.csv"]
