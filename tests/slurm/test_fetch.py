"""Set-up downloads a captioner only where a picture has no caption, and remembers it."""

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

import bases.finding
import captioning.captioner_loading
import img_captioning
from runtime.errors import UserError
from slurm.fetch import fetch, pictures_without_caption


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures: one with a row, one with a text file, one with neither, and one in a sub-folder."""
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    for name in ("row.jpg", "text.jpg", "none.jpg", "below/deep.jpg"):
        Image.new("RGB", (32, 48)).save(folder / name)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "row.jpg", "text": "grey"}) + "\n")
    (folder / "text.txt").write_text("grey")
    return folder


def test_rows_and_text_files_are_captions(folder):
    assert pictures_without_caption(folder, recursive=False) == [folder / "none.jpg"]
    assert set(pictures_without_caption(folder, recursive=True)) == {
        folder / "none.jpg",
        folder / "below" / "deep.jpg",
    }


def test_captions_in_another_file_count_and_not_those_of_the_folder(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("captions") / "mine.jsonl"
    file.write_text(json.dumps({"file_name": "none.jpg", "text": "grey"}) + "\n")
    assert pictures_without_caption(folder, False, metadata_file=file) == [folder / "row.jpg"]


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        pictures_without_caption(tmp_path, recursive=False)


@pytest.fixture
def fetched(folder, tmp_path, monkeypatch):
    """Runs fetch with a hub that only pretends; returns the captioners it was asked for, and what is remembered."""

    def run(captioner: str, allow_pickle: bool = False) -> tuple[list[tuple[str, bool]], str]:
        asked: list[tuple[str, bool]] = []

        def download(name: str, whole: bool) -> Path:
            asked.append((name, whole))
            return tmp_path

        monkeypatch.setattr(captioning.captioner_loading, "download_captioner", download)
        monkeypatch.setattr(bases.finding, "find_bases", lambda args: (tmp_path, tmp_path))
        record = tmp_path / "record"
        flags = img_captioning.parse_args(["--allow_pickle"] if allow_pickle else [])
        fetch(
            record,
            captioner,
            flags,
            argparse.Namespace(dataset=str(folder), more_datasets=None, metadata_file=None, dataset_config_name=None),
        )
        return asked, record.read_text() if record.exists() else ""

    return run


def test_the_captioner_is_fetched_for_a_picture_without_a_caption(fetched):
    assert fetched("some/captioner") == ([("some/captioner", False)], "captioner some/captioner\n")


def test_pickles_are_fetched_only_where_they_are_allowed(fetched):
    assert fetched("some/captioner", allow_pickle=True)[0] == [("some/captioner", True)]


def test_no_captioner_is_fetched_where_all_have_captions_or_it_is_a_folder(fetched, folder, tmp_path):
    assert fetched(str(tmp_path)) == fetched("") == ([], "")
    (folder / "none.txt").write_text("grey")
    assert fetched("some/captioner") == ([], "")
