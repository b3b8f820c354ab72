"""Files are complete or absent, and only half-written files of dead processes are removed."""

import errno
import os
import socket

import pytest

from runtime.errors import WriteError
from runtime.files import (
    atomic_folder,
    atomic_write,
    format_size,
    hash_key,
    remove_partial_files,
    remove_stale_partial_files,
)


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("old")
    with pytest.raises(ValueError, match="half way"), atomic_write(file) as partial:
        partial.write_text("ne")
        raise ValueError("half way")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("writing", [atomic_write, atomic_folder])
def test_a_full_disk_is_one_line_with_folder_needed_and_free(tmp_path, writing):
    said = rf"^{tmp_path}: model .*needs more than .*B, .*B are free"
    with pytest.raises(WriteError, match=said), writing(tmp_path / "model") as partial:
        (partial / "unet" if partial.is_dir() else partial).write_bytes(bytes(2000))
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "said"), [(0, "0 kB"), (146, "0.146 kB"), (2.5e6, "2.5 MB"), (10.34e9, "10.3 GB")])
def test_sizes_are_in_the_unit_one_would_say(size, said):
    assert format_size(size) == said


def test_a_replaced_file_keeps_its_mode(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("old")
    file.chmod(0o640)
    with atomic_write(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


def test_a_file_is_replaced_where_the_file_system_refuses_modes(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    file = tmp_path / "rows.jsonl"
    file.write_text("old")
    monkeypatch.setattr(os, "chmod", refused)  # as on exFAT
    with atomic_write(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["rows.jsonl"]


def test_partial_files_are_removed_but_not_those_of_a_process_that_waits_for_the_lock(tmp_path):
    (tmp_path / "cache").mkdir()
    for name in (".run.json.node7.1.part", "cache/.a.node7.1.part", ".lock.node7.1.part", "kept.part"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.part")) == [
        ".lock.node7.1.part",
        "kept.part",
    ]


def test_in_a_shared_folder_only_partial_files_of_dead_processes_of_this_host_are_removed(tmp_path):
    host = socket.gethostname()
    dead, alive, elsewhere = f".a.{host}.{2**30}.part", f".a.{host}.{os.getpid()}.part", f".a.other-host.{2**30}.part"
    for name in (dead, alive, elsewhere):
        (tmp_path / name).touch()
    remove_stale_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([alive, elsewhere])


def test_a_cache_key_stays_the_same_between_versions():
    """Old caches stay valid, and old runs resume from theirs."""
    assert hash_key("a", 1) == "cac4bfac03be58a57589708b5ff66358"


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ValueError, match="half way"), atomic_folder(tmp_path / "model") as partial:
        (partial / "unet").mkdir()
        raise ValueError("half way")
    assert os.listdir(tmp_path) == []
    litter = tmp_path / f".model.{socket.gethostname()}.{2**30}.part"
    (litter / "unet").mkdir(parents=True)
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "unet").mkdir()
        (partial / "unet" / "config.json").write_text("{}")
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model" / "unet" / "config.json").is_file()


def test_what_an_earlier_process_of_the_same_number_left_is_replaced(tmp_path):
    left = tmp_path / f".model.{socket.gethostname()}.{os.getpid()}.part"  # in a container every job may be process 1
    (left / "unet").mkdir(parents=True)
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "vae").mkdir()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["vae"]


def test_of_two_processes_that_make_the_same_folder_the_first_wins(tmp_path):
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "second").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "first").touch()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["first"]


def test_a_folder_that_a_killed_process_left_half_written_is_removed_too(tmp_path):
    (tmp_path / ".unet.elsewhere.7.part" / "shard").mkdir(parents=True)
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == []
