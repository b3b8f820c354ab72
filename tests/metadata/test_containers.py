"""Which tar shards and parquet files a --dataset names: files, folders, patterns; what is refused."""

import pytest

from captioned_folder import write_captioned_folder
from metadata.containers import base_folder, container_of, find_containers, read_bytes, title_of, unread_containers
from packed_data import write_shard
from runtime.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(dataset):
    return [path.name for path in find_containers(dataset)]


def test_a_picture_of_a_container_has_the_path_below_it(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [("x/a.jpg", b"content")])
    (tmp_path / "b.jpg").write_bytes(b"b")
    assert container_of(shard / "x" / "a.jpg") == container_of(shard) == shard
    assert container_of(tmp_path / "b.jpg") == tmp_path / "b.jpg"
    assert read_bytes(shard / "x" / "a.jpg") == b"content" and read_bytes(tmp_path / "b.jpg") == b"b"


def test_a_folder_that_holds_only_containers_is_those_in_the_order_of_their_names(tmp_path):
    touch(tmp_path, "data/b.tar", "data/a.tar", "c.parquet", "README.md", ".cache/d.tar", "0_stats.json")
    assert names(tmp_path) == ["c.parquet", "a.tar", "b.tar"]
    touch(tmp_path, "1.jpg")
    assert names(tmp_path) == []


def test_a_captioned_folder_is_one_whatever_lies_beside_it(tmp_path):
    folder = write_captioned_folder(tmp_path / "data")
    touch(folder, "pictures.tar", "old.tar.gz")
    touch(tmp_path / "split", "all.tar", "train/metadata.csv")
    assert names(folder) == names(tmp_path / "split") == []


def test_other_splits_and_tables_of_addresses_are_not_read_and_are_named(tmp_path):
    touch(tmp_path, "train-0.parquet", "test-0.parquet", "validation/0.tar", "00000.tar", "00000.parquet")
    assert names(tmp_path) == ["00000.tar", "train-0.parquet"]
    assert unread_containers(tmp_path) == ["00000.parquet", "test-0.parquet", "validation/0.tar"]
    touch(tmp_path / "other", "test.tar")
    with pytest.raises(UserError, match=r"test\.tar"):
        names(tmp_path / "other")
    assert names(tmp_path / "other" / "test.tar") == ["test.tar"]


def test_a_pattern_is_what_a_shell_makes_of_it(tmp_path):
    touch(tmp_path, *(f"s-{number:03d}.tar" for number in range(8, 12)), "more/a.tar")
    assert names(tmp_path / "s-*.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert names(tmp_path / "s-{009..011}.tar") == ["s-009.tar", "s-010.tar", "s-011.tar"]
    assert names(tmp_path / "{more/a,s-00[89]}.tar") == ["a.tar", "s-008.tar", "s-009.tar"]
    assert names(tmp_path / "**" / "*.tar")[-1] == "s-011.tar"
    touch(tmp_path, "{1,2}.tar")
    assert names(tmp_path / "{1,2}.tar") == ["{1,2}.tar"]  # a file of this name


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("*.parquet", r"\*\.parquet.*no file matches"),
        ("{000..003}.tar", r"2 of 4 files are not there, the first is .*002\.tar"),
        ("n*", r"notes\.txt: neither"),
        ("none.tar", r"none\.tar: no such file"),
        ("notes.txt", r"notes\.txt: neither"),
        ("0.tar.gz", r"0\.tar\.gz: compressed"),
        ("*.gz", r"0\.tar\.gz: compressed"),
        ("packed", r"1\.zip: compressed"),
        ("{0..99999999}.tar", "more than 100,000 files"),
    ],
)
def test_what_names_no_container_is_refused(tmp_path, dataset, words):
    touch(tmp_path, "000.tar", "001.tar", "notes.txt", "0.tar.gz", "packed/1.zip")
    with pytest.raises(UserError, match=words):
        find_containers(tmp_path / dataset)


def test_a_hub_id_and_a_folder_that_is_not_there_are_left_to_others(tmp_path):
    for name in ("owner/name", "no/such/folder"):
        assert names(tmp_path / name) == []


def test_results_are_named_after_the_file_or_the_folder_of_the_pattern(tmp_path):
    touch(tmp_path / "jeans", "0.tar")
    jeans = tmp_path / "jeans"
    assert [title_of(name) for name in (jeans, jeans / "*.tar", jeans / "s-{0..9}.tar", jeans / "0.tar")] == [
        *["jeans"] * 3, "0",
    ]  # fmt: skip
    assert base_folder(jeans / "0.tar") == base_folder(jeans / "*" / "0.tar") == jeans
