"""Data sets: a captioned folder and containers are taken as they are; what only `datasets` reads is written as one."""

from argparse import Namespace
from pathlib import Path

import pytest

from captioned_folder import write_captioned_folder
from metadata.hub_datasets import find_dataset
from metadata.reading import read_captions
from runtime.errors import UserError


def args_of(dataset: Path | str, cache: Path, **flags) -> Namespace:
    usual = {"dataset_config_name": None, "image_column": "image", "caption_column": "text", "hub_token": None}
    usual["metadata_file"] = None
    return Namespace(dataset=str(dataset), cache_dir=str(cache), **{**usual, **flags})


# Parquet files of which one configuration is asked for are read through `datasets`, as data sets of the hub are.
THROUGH_DATASETS = {"dataset_config_name": "default"}


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


def test_captions_in_another_file_are_of_the_folder_itself(tmp_path):
    write_captioned_folder(tmp_path / "train")
    captions = {"metadata_file": tmp_path / "captions.jsonl"}
    assert find_dataset(args_of(tmp_path, tmp_path, **captions)) == tmp_path
    with pytest.raises(UserError, match="--metadata_file needs a folder of pictures"):
        find_dataset(args_of("some/dataset", tmp_path, **captions))


def test_another_caption_column_is_another_folder_and_the_same_is_written_once(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    pictures = [str(path) for path in sorted(data.glob("*.JPG"))]
    tables = parquet(tmp_path / "tables", {"image": pictures, "text": ["a", "b", "c"], "long": ["aa", "bb", "cc"]})
    first = find_dataset(args_of(tables, tmp_path / "cache", **THROUGH_DATASETS))
    assert len(list(first.glob("*.JPG"))) == 3 and '"text": "a"' in (first / "metadata.jsonl").read_text()
    made = (first / "metadata.jsonl").stat().st_mtime_ns
    assert find_dataset(args_of(tables, tmp_path / "cache", **THROUGH_DATASETS)) == first
    assert (first / "metadata.jsonl").stat().st_mtime_ns == made
    other = find_dataset(args_of(tables, tmp_path / "cache", caption_column="long", **THROUGH_DATASETS))
    assert other != first and '"long": "aa"' in (other / "metadata.jsonl").read_text()
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, other.name])


def test_repeats_of_a_table_are_those_of_its_rows(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    pictures = [str(path) for path in sorted(data.glob("*.JPG"))]
    tables = parquet(tmp_path / "tables", {"image": pictures, "text": ["a", "b", "c"], "repeats": [1.0, 0.5, 2.0]})
    folder = find_dataset(args_of(tables, tmp_path / "cache", **THROUGH_DATASETS))
    assert [row.repeats for row in read_captions(folder)] == [1, 0.5, 2]


def test_parquet_files_and_tar_shards_are_taken_as_they_are(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    tables = parquet(tmp_path / "tables", {"image": [str(data / "11 (1).JPG")], "text": ["a"]})
    assert find_dataset(args_of(tables, tmp_path / "cache")) == tables
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="--metadata_file needs a folder of pictures"):
        find_dataset(args_of(tables, tmp_path, metadata_file=tmp_path / "captions.jsonl"))


def test_a_row_without_a_picture_is_named(tmp_path):
    data = write_captioned_folder(tmp_path / "data")
    tables = parquet(tmp_path / "tables", {"image": [str(data / "11 (1).JPG"), None], "text": ["a", "b"]})
    with pytest.raises(UserError, match="row 1: `image` holds no picture"):
        find_dataset(args_of(tables, tmp_path / "cache", **THROUGH_DATASETS))
