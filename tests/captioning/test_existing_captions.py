"""Captions that are there are found and left alone; empty rows are filled."""

import json
from pathlib import Path

import pytest
from PIL import Image

from captioning import caption_folder
from img_captioning import caption_or_check, parse_args
from metadata.files import find_metadata_files
from metadata.reading import read_captions
from runtime.errors import UserError, WorkError


class SaysBlue:
    no_caption_message = "no words"

    def caption(self, images):
        return ["Here is a short caption: blue"] * len(images)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (300, 260), (60 * number, 20, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def caption(folder, monkeypatch):
    """Captions with a stub of a captioner; with `model` False a captioner must not be needed."""

    def run(*flags: str, model: bool = True) -> None:
        monkeypatch.setattr(caption_folder, "load_captioner", lambda *_, **__: SaysBlue() if model else 1 / 0)
        caption_or_check(parse_args(["--image_dir", str(folder), "--model", "stub", *flags]))

    return run


def write(folder: Path, *rows: dict) -> bytes:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (folder / "metadata.jsonl").read_bytes()


def texts(folder: Path) -> dict[str, object]:
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return {row["file_name"]: row.get("text") for row in rows}


# --- --existing fill ------------------------------------------------------------------------------------------------


def test_filling_captions_empty_rows_in_place_from_text_files_first(folder, caption, capsys):
    write(folder, {"file_name": "2.png", "n": 1, "text": ""}, {"file_name": "0.png", "text": "mine"},
          {"text": None, "file_name": "1.png"}, {"file_name": "gone.png", "text": ""})  # fmt: skip
    (folder / "1.TXT").write_text("by hand")
    (folder / "0.txt").write_text("another")
    caption("--existing", "fill", "--trigger", "sks")
    assert texts(folder) == {
        "2.png": "sks, blue", "0.png": "mine", "1.png": "sks, by hand", "gone.png": "", "3.png": "sks, blue",
    }  # fmt: skip
    assert "0.txt" in capsys.readouterr().out  # it differs from its row
    assert sorted(path.name for path in folder.glob("*.jsonl*")) == ["metadata.jsonl"]
    before = (folder / "metadata.jsonl").read_bytes()
    caption("--existing", "fill", model=False)  # nothing is left to do
    assert (folder / "metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("row", "filled"),
    [({"text": ""}, True), ({"text": " \n"}, True), ({"text": None}, True), ({"text": []}, True), ({}, True),
     ({"text": ["", " "]}, True), ({"text": ["a", ""]}, False), ({"text": 5}, False), ({"text": "a"}, False)],
)  # fmt: skip
def test_only_an_empty_caption_is_filled(folder, caption, row, filled):
    write(folder, {"file_name": "0.png", **row}, *({"file_name": f"{n}.png", "text": f"{n}"} for n in (1, 2, 3)))
    caption("--existing", "fill")
    assert texts(folder)["0.png"] == ("blue" if filled else row.get("text"))


def test_without_fill_an_empty_row_stays_and_the_way_out_is_named(folder, caption, capsys):
    before = write(folder, *({"file_name": f"{n}.png", "text": ""} for n in range(4)))
    caption(model=False)
    assert "4 captions are empty" in (said := capsys.readouterr().out) and "--existing fill" in said
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_a_row_that_cannot_be_filled_is_named_instead_of_advice_that_does_nothing(folder, caption, capsys):
    (folder / "sub").mkdir()
    (folder / "3.png").rename(folder / "sub" / "3.png")
    write(folder / "sub", {"file_name": "3.png", "text": ""})
    write(folder, {"file_name": "0.png", "text": 5}, {"file_name": "1.png", "text": ["a", ""]},
          {"file_name": "2.png", "caption": "a dog"})  # fmt: skip
    for flags in ((), ("--existing", "fill")):
        caption(*flags, model=False)
        said = capsys.readouterr().out.split("checked the data")[0]
        assert "--existing fill" not in said and "--caption_column caption" in said
        assert all(where in said for where in ("line 1:", "line 2:", "line 3:", "sub/metadata.jsonl, line 1:"))


# --- metadata.csv ---------------------------------------------------------------------------------------------------


def test_captions_in_a_csv_file_are_found_and_nothing_is_written(folder, caption, capsys):
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a dog\n1.png,a cat\n")
    caption(model=False)
    said = capsys.readouterr().out
    assert "2 of 4 pictures have a row" in said and "2.png" in said and "tokens of 2 captions" in said
    with pytest.raises(WorkError):
        caption("--check", model=False)
    assert "pictures without a row: 2" in capsys.readouterr().out
    for existing in ("fill", "replace"):
        with pytest.raises(UserError, match=f"--existing {existing}: .*metadata.csv"):
            caption("--existing", existing, model=False)
    assert not list(folder.glob("*.jsonl*"))


def test_a_csv_file_elsewhere_is_read_too_and_never_written(folder, caption, capsys, tmp_path_factory):
    file = tmp_path_factory.mktemp("captions") / "mine.csv"
    with pytest.raises(UserError, match="lines of JSON"):
        caption("--output", str(file), model=False)
    file.write_text("file_name,text\n0.png,a dog\n")
    caption("--output", str(file), model=False)
    said = capsys.readouterr().out
    assert "1 of 4 pictures have a row" in said and f"--metadata_file {file}" in said


def test_of_a_file_further_up_the_rows_count_and_not_those_of_the_folder(folder, caption, capsys):
    pictures = folder / "pictures"
    pictures.mkdir()
    (folder / "0.png").rename(pictures / "0.png")
    write(pictures, {"file_name": "0.png", "text": "not read"})
    caption("--image_dir", str(pictures), "--output", str(folder / "metadata.jsonl"))
    assert texts(folder) == {"pictures/0.png": "blue"}
    (folder / "dogs").mkdir()
    (folder / "1.png").rename(folder / "dogs" / "1.png")
    caption("--image_dir", str(folder / "dogs"), "--output", str(folder / "metadata.jsonl"))
    named = folder / "metadata.jsonl"
    assert capsys.readouterr().out.count(f"--dataset {folder} --metadata_file {named}") == 2
    files = find_metadata_files(folder, named=named)
    assert [row.file_name for row in read_captions(folder, files=files)] == ["pictures/0.png", "dogs/1.png"]


def test_a_csv_file_beside_a_jsonl_file_is_wrong(folder, caption, capsys):
    write(folder, *({"file_name": f"{n}.png", "text": f"{n}"} for n in range(4)))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a dog\n")
    with pytest.raises(WorkError):
        caption("--check", model=False)
    assert "not read" in (said := capsys.readouterr().out) and "metadata.csv" in said


@pytest.mark.parametrize("name", ["Metadata.jsonl", "metadata.json", "metadata.parquet", "train/metadata.jsonl.txt"])
@pytest.mark.parametrize("flags", [(), ("--check",), ("--existing", "replace")])
def test_nothing_is_captioned_beside_a_file_that_may_hold_the_captions(folder, caption, name, flags):
    (folder / "train").mkdir()
    (folder / name).write_text("[]")
    with pytest.raises(UserError, match=name):
        caption(*flags, model=False)


# --- another key, misspelt names, sub-folders -----------------------------------------------------------------------


def test_captions_under_another_key_are_named_and_completed_with_it(folder, caption, capsys):
    before = write(folder, *({"file_name": f"{n}.png", "caption": f"{n}"} for n in range(3)))
    for existing in ("keep", "fill", "replace"):
        with pytest.raises(UserError, match=r"line 1: .*--caption_column caption"):
            caption("--existing", existing, model=False)
    assert (folder / "metadata.jsonl").read_bytes() == before
    caption("--caption_column", "caption")
    assert [row.captions for row in read_captions(folder, "caption")] == [("0",), ("1",), ("2",), ("blue",)]


def test_a_picture_with_a_row_under_almost_its_name_is_not_captioned(folder, caption):
    before = write(folder, {"file_name": "0.PNG", "text": "mine"}, {"file_name": "train\\1.png", "text": "mine"})
    with pytest.raises(UserError, match=r'line 1: .*"0.png".*\n.*line 2: .*"1.png"'):
        caption(model=False)
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_a_folder_with_captions_in_its_train_folder_is_not_told_to_rename_them(folder, caption, capsys):
    (folder / "train").mkdir()
    for number in range(4):
        (folder / f"{number}.png").rename(folder / "train" / f"{number}.png")
    write(folder / "train", *({"file_name": f"{n}.png", "text": f"{n}"} for n in range(4)))
    caption(model=False)
    assert "4 rows" in capsys.readouterr().out


def test_where_metadata_jsonl_is_a_folder_no_flag_is_blamed_that_was_not_given(folder, caption):
    (folder / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metadata.jsonl: a folder") as caught:
        caption(model=False)
    assert not str(caught.value).startswith("--output")


def test_training_is_not_promised_for_pictures_that_are_links_out_of_the_folder(folder, caption, capsys):
    (folder / "links").mkdir()
    (folder / "links" / "0.png").symlink_to(folder / "0.png")
    caption("--image_dir", str(folder / "links"), "--output", str(folder / "links" / "other.jsonl"))
    said = capsys.readouterr().out
    assert "training refuses" in said and "--metadata_file" not in said


def test_sub_folders_with_rows_of_their_own_are_read_and_not_captioned(folder, caption, capsys):
    (folder / "dogs").mkdir()
    for number in range(4):
        (folder / f"{number}.png").rename(folder / "dogs" / f"{number}.png")
    write(folder / "dogs", *({"file_name": f"{n}.png", "text": f"{n}"} for n in range(3)))
    for flags in ((), ("--recursive",)):
        caption(*flags, model=False)
        assert "no pictures directly in" in capsys.readouterr().out
    with pytest.raises(WorkError):
        caption("--check", model=False)
    assert "dogs/3.png" in capsys.readouterr().out
    assert not (folder / "metadata.jsonl").exists()


def test_advice_for_a_folder_without_pictures_leads_somewhere(folder, tmp_path, caption):
    above = folder / "above"
    (above / "validation").mkdir(parents=True)
    (folder / "0.png").rename(above / "validation" / "0.png")
    write(above / "validation", {"file_name": "0.png", "text": "a"})
    for flags in ((), ("--recursive",)):
        with pytest.raises(UserError, match="validation has pictures with captions") as caught:
            caption_or_check(parse_args(["--image_dir", str(above), *flags]))
        assert "--recursive" not in str(caught.value)
