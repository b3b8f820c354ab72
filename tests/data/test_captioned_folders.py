"""Several folders are one data set: pictures in order, names that tell them apart, no picture twice, shares."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from captioned_folder import READING, write_captioned_folder
from data.captioned_folders import folder_shares, read_dataset
from data.dataset import hash_dataset, read_pictures
from metadata.hub_datasets import find_datasets
from metadata.picture_names import distinct_names
from runtime.errors import UserError
from train_text_to_image import parse_args


def folder(path: Path, *names: str, repeats: float | None = None) -> Path:
    write_captioned_folder(path, {name: f"{path.name} {name}" for name in names})
    more = {} if repeats is None else {"repeats": repeats}
    rows = [{"file_name": name, "text": f"{path.name} {name}", **more} for name in names]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*folders: Path):
    return read_dataset(READING, Accelerator(cpu=True), folders)


def test_pictures_come_folder_by_folder_and_the_hash_of_one_folder_stays(tmp_path):
    jeans, others = folder(tmp_path / "jeans", "1.jpg", "2.jpg"), folder(tmp_path / "others", "1.jpg")
    both = read(jeans, others)
    assert [picture.path for picture in both.pictures] == [jeans / "1.jpg", jeans / "2.jpg", others / "1.jpg"]
    alone = read(jeans).pictures
    assert hash_dataset(alone) == hash_dataset(read_pictures(jeans, True)) != hash_dataset(both.pictures)


def test_the_hash_counts_repeats_other_than_1(tmp_path):
    plain, one, half = (
        hash_dataset(read(folder(tmp_path / name / "x", "1.jpg", repeats=repeats)).pictures)
        for name, repeats in (("plain", None), ("one", 1), ("half", 0.5))
    )
    assert plain == one != half


def test_the_share_of_a_folder_is_that_of_its_repeats(tmp_path):
    few = folder(tmp_path / "few", "1.jpg", repeats=3)
    many = folder(tmp_path / "many", "1.jpg", "2.jpg", repeats=0.5)
    assert folder_shares(read(few, many).pictures) == {few: (1, 0.75), many: (2, 0.25)}


def test_what_is_left_out_is_named_with_its_folder_where_there_are_several(tmp_path):
    jeans, others = folder(tmp_path / "jeans", "1.jpg"), folder(tmp_path / "others", "1.jpg")
    (others / "2.jpg").write_bytes((others / "1.jpg").read_bytes())
    (jeans / "3.HEIC").touch()
    (jeans / "1.txt").write_text("something else")
    both = read(jeans, others)
    assert both.without_caption == [str(others / "2.jpg")] and both.unreadable == [str(jeans / "3.HEIC")]
    assert both.caption_sources.differing == [str(jeans / "1.txt")]
    assert read(jeans).unreadable == ["3.HEIC"] and read(jeans).caption_sources.differing == ["1.txt"]


def test_a_picture_that_two_folders_have_is_refused_by_name(tmp_path):
    outer = folder(tmp_path / "outer", "1.jpg")
    inner = folder(outer / "inner", "2.jpg")
    for folders in ((outer, inner), (outer, outer), (outer, outer / ".." / "outer")):
        with pytest.raises(UserError, match=r"--dataset .*\.jpg is in --dataset"):
            read(*folders)


def test_every_folder_is_found_as_the_single_one_is(tmp_path):
    own, split = folder(tmp_path / "own", "1.jpg"), tmp_path / "split"
    folder(split / "train", "1.jpg")
    args = parse_args(["--dataset", str(own), "--dataset", str(split)])
    assert (args.dataset, args.more_datasets) == (str(own), [str(split)])
    assert find_datasets(args) == [own, split / "train"]
    alone = parse_args(["--dataset", str(own)])
    assert alone.more_datasets is None and find_datasets(alone) == [own]


def test_one_metadata_file_for_several_folders_is_refused():
    with pytest.raises(UserError, match="--metadata_file"):
        parse_args(["--dataset", "a", "--dataset", "b", "--metadata_file", "c.jsonl"])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.jpg", "a/2.jpg"], ["1.jpg", "2.jpg"]),
        (["a/1.jpg", "b/1.jpg", "b/2.jpg"], ["a/1.jpg", "b/1.jpg", "2.jpg"]),
        (["x/train/1.jpg", "y/train/1.jpg"], ["x/train/1.jpg", "y/train/1.jpg"]),
        (["1.jpg", "a/1.jpg"], ["1.jpg", "a/1.jpg"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_tells_pictures_apart(paths, names):
    paths = [Path(path) for path in paths]
    assert [distinct_names(paths)[path] for path in paths] == names
