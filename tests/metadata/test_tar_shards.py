"""Tar shards: which members are a sample, where its caption is, and what is refused by shard and member."""

import io
import json
import tarfile

import pytest

from metadata.packed_captions import read_packed_captions
from metadata.tar_shards import list_masks, list_samples, read_member, read_rows
from packed_data import write_shard
from runtime.errors import UserError

A = ("a.jpg", b"picture a"), ("a.txt", b"caption a")


def rows(path, *members, column="text"):
    return dict(read_rows(write_shard(path / "0.tar", members), column))


def fault_of(path, *members):
    """What training says."""
    with pytest.raises(UserError) as error:
        read_packed_captions([write_shard(path / "0.tar", members)], "text", "image", lambda row: None)
    return str(error.value)


def test_members_with_one_name_up_to_its_first_dot_are_a_sample(tmp_path):
    below = ("x/a.JPG", b"another"), ("x/a.txt", b"caption x"), ("x/a.cls", b"3")
    assert rows(tmp_path, *A, *below) == {"a.jpg": {"text": ["caption a"]}, "x/a.JPG": {"text": ["caption x"]}}
    assert read_member(tmp_path / "0.tar", "x/a.JPG") == b"another"


def test_of_several_captions_the_column_that_is_asked_for_wins_then_the_text_file(tmp_path):
    both = json.dumps({"caption": "of the json", "long": "long", "repeats": 2}).encode()
    members = *A, ("a.json", both)
    assert rows(tmp_path, *members) == {"a.jpg": {"text": ["caption a"], "repeats": 2}}
    assert rows(tmp_path, *members, column="long") == {"a.jpg": {"long": "long", "repeats": 2}}
    assert rows(tmp_path, A[0], ("a.json", both)) == {"a.jpg": {"text": "of the json", "repeats": 2}}


def test_a_text_in_a_shard_is_read_as_one_beside_a_picture(tmp_path):
    text = "\ufeffone\r\ntwo\r\n".encode()
    assert rows(tmp_path, A[0], ("a.txt", text)) == {"a.jpg": {"text": ["one", "two"]}}
    assert rows(tmp_path, A[0], ("a.txt", b" \n"), ("b.jpg", b"-"), ("b.json", b"{}")) == {}


def test_hidden_files_and_folders_are_left_out_and_long_and_foreign_names_are_read(tmp_path):
    long = f"{'folder/' * 30}{'ü' * 120}"
    more = ("._a.jpg", b"resource"), ("__MACOSX/._a.jpg", b"resource"), (f"{long}.jpg", b"b"), (f"{long}.txt", b"long")
    found = dict(read_rows(write_shard(tmp_path / "pax.tar", [*A, *more]), "text"))
    assert found == {"a.jpg": {"text": ["caption a"]}, f"{long}.jpg": {"text": ["long"]}}
    gnu = tmp_path / "gnu.tar"
    (tmp_path / "files").mkdir()
    for name, content in [*A, ("é" * 70 + ".jpg", b"b"), ("é" * 70 + ".txt", b"long")]:
        (tmp_path / "files" / name).write_bytes(content)
    with tarfile.open(gnu, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "files", arcname=".")  # as `tar -cf gnu.tar .`
    assert dict(read_rows(gnu, "text")) == {"a.jpg": {"text": ["caption a"]}, "é" * 70 + ".jpg": {"text": ["long"]}}
    assert read_member(gnu, "é" * 70 + ".jpg") == b"b"


def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path):
    members = [(f"{'d/' * (number % 60)}{number}.jpg", b"x" * number * 37) for number in range(200)]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        assert [sample.picture for sample in list_samples(path)] == [name for name, _ in members]
        assert all(read_member(path, name) == content for name, content in members)


def test_a_shard_that_was_written_again_is_listed_again(tmp_path):
    assert rows(tmp_path, *A)
    assert rows(tmp_path, ("b.jpg", b"a longer picture"), ("b.txt", b"caption b")).keys() == {"b.jpg"}
    with pytest.raises(FileNotFoundError):
        read_member(tmp_path / "0.tar", "a.jpg")


def test_the_picture_of_a_sample_is_the_one_without_a_second_suffix_and_masks_are_none(tmp_path):
    shard = write_shard(tmp_path / "0.tar", [*A, ("a.depth.png", b"-"), ("a.mask.png", b"-"), ("b.heic", b"-")])
    assert [sample.picture for sample in list_samples(shard)] == ["a.jpg", None]
    assert list_masks(shard) == ["a.mask.png"]
    assert [sample.unreadable for sample in list_samples(shard)] == [None, "b.heic"]


@pytest.mark.parametrize(
    ("members", "culprit", "word"),
    [
        ([*A, ("b.txt", b"a caption")], "0.tar/b.txt: ", "no picture"),
        ([*A, ("b.json", b'{"caption": "c"}')], "0.tar/b.json: ", "no picture"),
        ([*A, ("a.png", b"-")], "0.tar/a.jpg: ", "a.png"),
        ([A[0], ("a.json", b"{")], "0.tar/a.json: ", "JSON"),
        ([A[0], ("a.txt", b"\xff")], "0.tar/a.txt: ", "UTF-8"),
        ([A[0], ("a.json", b'{"text": 3}')], "0.tar/a.jpg: ", "`text`"),
        ([*A, ("a.json", b'{"repeats": -1}')], "0.tar/a.jpg: ", "`repeats`"),
        ([("a.jpg", b"-"), ("metadata.jsonl", b"{}")], "0.tar", "no picture with a caption"),
        ([*A, A[0]], "a.jpg", "twice"),
        ([*A, ("../b.jpg", b"-")], "../b.jpg", "leads out"),
    ],
)
def test_a_bad_sample_is_refused_by_shard_and_member(tmp_path, members, culprit, word):
    message = fault_of(tmp_path, *members)
    assert "0.tar" in message and culprit in message and word in message


def test_a_shard_that_is_not_whole_is_refused_after_which_member(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", [("a.jpg", b"x" * 5000), ("b.jpg", b"x" * 5000)]).read_bytes()
    damaged = bytearray(whole)
    damaged[512 + 5120] ^= 1  # in the second header
    second = 512 + 5120
    for content, last in (
        (whole[: second + 2000], "b.jpg"),
        (whole[: second + 300], "a.jpg"),
        (whole[:second], "a.jpg"),
        (whole[: 2 * second], "b.jpg"),
        (bytes(damaged), "a.jpg"),
    ):
        path = tmp_path / "0.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"0\.tar: truncated or damaged after {last}"):
            list_samples(path)


def test_what_is_no_plain_tar_is_refused_by_name(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", A).read_bytes()
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "whole.tar")
    with pytest.raises(UserError, match=r"0\.tar: compressed with gzip"):
        list_samples(path)
    for content, word in ((b"no tar at all" * 99, "0.tar: "), (b"", "0.tar: "), (whole * 2, "more follows")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=word):
            list_samples(path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"0\.tar: a\.jpg is a link"):
        list_samples(path)


def test_an_absolute_name_stays_within_the_shard(tmp_path):
    path = write_shard(tmp_path / "0.tar", [("/etc/a.jpg", b"-"), ("/etc/a.txt", b"caption")])
    assert [name for name, _ in read_rows(path, "text")] == ["etc/a.jpg"]
