"""Data sets and uploads: a folder stays one, what only `datasets` reads becomes one, a refused upload is one line."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import write_captioned_folder
from data.hub_datasets import find_dataset
from runs.model_card import GENERATED_MARK
from runs.upload import prepare_upload, upload
from runtime.errors import UserError, WorkError
from train_text_to_image import parse_args


def args_of(dataset: Path | str, cache: Path, **flags) -> Namespace:
    usual = {"dataset_config_name": None, "image_column": "image", "caption_column": "text", "hub_token": None}
    return Namespace(dataset=str(dataset), cache_dir=str(cache), **{**usual, **flags})


def parquet(folder: Path, rows: dict) -> Path:
    import datasets

    folder.mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    return folder


def test_a_captioned_folder_is_taken_as_it_is_and_its_train_folder_where_that_holds_the_rows(tmp_path):
    folder = write_captioned_folder(tmp_path / "data")
    assert find_dataset(args_of(folder, tmp_path)) == folder
    (tmp_path / "split").mkdir()
    train = write_captioned_folder(tmp_path / "split" / "train")
    assert find_dataset(args_of(tmp_path / "split", tmp_path)) == train


def test_another_caption_column_is_another_folder_and_the_same_is_written_once(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    pictures = [str(path) for path in sorted(data.glob("*.JPG"))]
    tables = parquet(tmp_path / "tables", {"image": pictures, "text": ["a", "b", "c"], "long": ["aa", "bb", "cc"]})
    first = find_dataset(args_of(tables, tmp_path / "cache"))
    assert len(list(first.glob("*.JPG"))) == 3 and '"text": "a"' in (first / "metadata.jsonl").read_text()
    made = (first / "metadata.jsonl").stat().st_mtime_ns
    assert find_dataset(args_of(tables, tmp_path / "cache")) == first
    assert (first / "metadata.jsonl").stat().st_mtime_ns == made
    other = find_dataset(args_of(tables, tmp_path / "cache", caption_column="long"))
    assert other != first and '"long": "aa"' in (other / "metadata.jsonl").read_text()
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, other.name])


def test_a_row_without_a_picture_is_named(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    tables = parquet(tmp_path / "tables", {"image": [str(data / "11 (1).JPG"), None], "text": ["a", "b"]})
    with pytest.raises(UserError, match="row 1: `image` holds no picture"):
        find_dataset(args_of(tables, tmp_path / "cache"))


def test_a_hub_that_refuses_is_one_line_before_the_training_and_after_it(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, *_, **__):
            raise RuntimeError("401 Unauthorized\nsee the documentation")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    args = Namespace(push_to_hub=True, hub_token="hf_secret", hub_model_id=None, logging_dir="logs")
    with pytest.raises(UserError, match="^--push_to_hub: 401 Unauthorized; log in"):
        prepare_upload(args, tmp_path)
    with pytest.raises(WorkError, match="401 Unauthorized; the result is in"):
        upload(args, tmp_path)


@pytest.mark.parametrize("card, replaced", [(None, True), ("ours", True), ("# somebody's own", False)])
def test_a_model_card_is_written_anew_unless_somebody_has_written_it(card, replaced, monkeypatch, tmp_path):
    there, uploaded = tmp_path / "there.md", []
    there.write_text(GENERATED_MARK if card == "ours" else card or "")
    api = SimpleNamespace(
        create_repo=lambda name, exist_ok: SimpleNamespace(repo_id=f"me/{name}"),
        upload_folder=lambda **what: None,
        file_exists=lambda repository, name: card is not None,
        hf_hub_download=lambda repository, name: str(there),
        upload_file=lambda **what: uploaded.append(what["path_in_repo"]),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    monkeypatch.setattr("runs.upload.make_model_card", lambda folder, repository: "the card")
    upload(parse_args(["--dataset", "x", "--push_to_hub"]), tmp_path)
    assert uploaded == ["README.md"] * replaced
