"""Tensors in shards are read back as they were written; a damaged shard is named, removed and made again alone."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file

from runtime import tensor_shards
from runtime.errors import InputChanged, WorkError
from runtime.tensor_shards import ShardWriter, TensorShards

ROWS = {
    f"row {i}": {f"row {i}": torch.full((2, 3), float(i)), f"row {i} half": torch.ones(i).half()} for i in range(7)
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven rows in shards of three."""
    monkeypatch.setattr(tensor_shards, "MOST_ROWS", 3)
    with ShardWriter(tmp_path / "shards") as writer:
        for row in ROWS.values():
            writer.add(row)
    assert len(writer.written) == 3
    return tmp_path / "shards"


def shard_of(folder, name):
    return next(path for path in folder.glob("*.safetensors") if name in load_file(path))


def test_tensors_are_read_back_as_they_were_written(folder):
    shards = TensorShards(folder)
    for row in ROWS.values():
        for name, tensor in row.items():
            assert torch.equal(shards.read(name), tensor) and shards.read(name).dtype == tensor.dtype
    assert shards.has(["row 6", "row 7", "row 2 half"]).tolist() == [True, False, True]
    assert TensorShards(folder / "none").has(["row 6"]).tolist() == [False]


def test_other_programs_read_them(folder):
    assert sum(len(load_file(path)) for path in folder.iterdir()) == 14


def test_a_start_reads_the_headers_alone(folder):
    """Bytes that a start would have to look at are changed under it: it sees nothing of that, only a read does."""
    path = shard_of(folder, "row 4")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert TensorShards(folder).has(list(ROWS)).all()


@pytest.mark.parametrize("damage", ["flip", "cut", "other size", "rubbish", "empty"])
def test_a_damaged_shard_is_named_and_removed_and_made_again_alone(folder, damage):
    before, path = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}, shard_of(folder, "row 4")
    shards, content = TensorShards(folder), path.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1  # the last tensor of the file
    damaged = {"flip": bytes(flipped), "cut": content[:-1], "other size": content + b"0", "rubbish": b"rubbish" * 9}
    path.write_bytes(damaged.get(damage, b""))
    if damage in ("flip", "cut", "empty"):  # while a run reads it
        with pytest.raises(InputChanged, match=re.escape(path.name)) as refused:
            for name in ["row 3", "row 3 half", "row 4", "row 4 half", "row 5", "row 5 half"]:
                shards.read(name)
        assert "damaged" in str(refused.value) and "\n" not in str(refused.value)
    again = TensorShards(folder)
    missing = [name for name, there in zip(ROWS, again.has(list(ROWS)), strict=True) if not there]
    assert missing == ["row 3", "row 4", "row 5"] and not path.exists()
    with ShardWriter(folder) as writer:
        for name in missing:
            writer.add(ROWS[name])
    again.refresh(writer.written)
    assert torch.equal(again.read("row 4"), ROWS["row 4"]["row 4"])
    after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert after.keys() == before.keys() and sum(after[name] != before[name] for name in before) == 1


def test_other_bits_of_the_same_names_are_another_shard(folder):
    """As another kind of processor makes them: what a run has opened stays as it is."""
    shards = TensorShards(folder)
    with ShardWriter(folder) as writer:
        for name in ("row 0", "row 1", "row 2"):
            writer.add({key: tensor + 1 for key, tensor in ROWS[name].items()})
    assert torch.equal(shards.read("row 1"), ROWS["row 1"]["row 1"])
    shards.refresh()
    assert len(shards.file_names) == 4 and torch.equal(shards.read("row 1"), ROWS["row 1"]["row 1"])


def test_a_shard_that_cannot_be_read_is_named_and_stays(folder, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TensorShards, "_table_of", refuse)
    with pytest.raises(WorkError, match=r"shard-\w+\.safetensors: cannot be read \(Input/output error\)"):
        TensorShards(folder)
    assert len(list(folder.iterdir())) == 3


def test_others_may_read_a_shard_where_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        with ShardWriter(tmp_path) as writer:
            writer.add(ROWS["row 1"])
    finally:
        os.umask(before)
    assert (tmp_path / writer.written[0]).stat().st_mode & 0o777 == 0o644


def test_a_shard_that_is_gone_is_named(folder):
    shards, path = TensorShards(folder), shard_of(folder, "row 0")
    path.unlink()
    with pytest.raises(InputChanged, match=f"{re.escape(path.name)}: no such file any more"):
        shards.read("row 0")


def test_what_was_never_there_is_not_served(folder, tmp_path):
    for shards in (TensorShards(folder), TensorShards(tmp_path / "none")):
        for name in ("row 8", "row 9", "row 10", "row 11"):
            with pytest.raises(InputChanged, match="not there"):
                shards.read(name)
    assert len(list(folder.iterdir())) == 3


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WorkError, match="file/shards: encodings cannot be written"),
        ShardWriter(tmp_path / "file" / "shards") as writer,
    ):
        writer.add(ROWS["row 1"])


def test_a_tensor_of_another_name_is_not_served_for_one_of_the_same_hash(folder):
    shards = TensorShards(folder)
    shards._table["name"][shards._table["name"] == tensor_shards._hash("row 0")] = tensor_shards._hash("row 9")
    shards._table.sort(order="name")
    with pytest.raises(InputChanged, match="checksum"):
        shards.read("row 9")


def test_two_writers_of_the_same_rows_share_them(folder):
    with ShardWriter(folder) as writer:
        writer.add(ROWS["row 1"])
    shards = TensorShards(folder)
    assert len(list(folder.iterdir())) == 4
    assert torch.equal(shards.read("row 1"), ROWS["row 1"]["row 1"])


def test_what_an_error_interrupts_is_written_and_what_kill_minus_9_leaves_is_removed(tmp_path):
    folder = tmp_path / "shards"
    with pytest.raises(KeyError), ShardWriter(folder) as writer:
        writer.add(ROWS["row 1"])
        raise KeyError
    assert TensorShards(folder).has(["row 1"]).all()
    child = os.fork()
    if not child:  # writes half of a shard and dies
        (folder / f".shard-x.safetensors.{os.uname().nodename}.{os.getpid()}.part").write_bytes(b"half")
        os._exit(9)
    os.waitpid(child, 0)
    with ShardWriter(folder) as writer:
        writer.add(ROWS["row 2"])
    assert not list(folder.glob(".*")) and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("limit", "value"), [("MOST_BYTES", 20), ("MOST_SECONDS", 0.0), ("MOST_ROWS", 1)])
def test_a_shard_ends_at_each_limit(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(tensor_shards, limit, value)
    with ShardWriter(tmp_path) as writer:
        for name in ("row 1", "row 2"):
            writer.add(ROWS[name])
        assert len(writer.written) == 2
