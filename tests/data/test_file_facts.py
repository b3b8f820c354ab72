"""A file is not read again while it has not changed, and always where it may have."""

import os
import pickle

import pytest

from data import file_facts
from data.file_facts import FileFacts


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "1.jpg"
    path.write_bytes(b"one")
    return path


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """As if files had been there for long."""
    monkeypatch.setattr(file_facts, "SETTLED", -1.0)


def content(facts, path):
    """What is known of it, and whether it was read."""
    read = []
    found = facts.of(path, "content", lambda: read.append(1) or path.read_bytes().decode())
    return found, bool(read)


def test_what_an_earlier_start_found_is_not_looked_for_again(tmp_path, picture):
    facts = FileFacts()
    assert content(facts, picture) == ("one", True) and content(facts, picture) == ("one", False)
    assert facts.of(picture, "size", lambda: [1, 2]) == [1, 2]
    facts.save(tmp_path / "cache" / "files.jsonl")
    later = FileFacts.load([tmp_path / "none", tmp_path / "cache" / "files.jsonl"])
    assert content(later, picture) == ("one", False) and later.of(picture, "size", list) == [1, 2]


@pytest.mark.parametrize("change", ["content", "same size and time", "replaced", "touched"])
def test_a_file_that_may_have_changed_is_read_again(tmp_path, picture, change):
    facts = FileFacts()
    content(facts, picture)
    stat = picture.stat()
    if change == "replaced":
        (tmp_path / "new").write_bytes(b"two")
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (tmp_path / "new").replace(picture)
    elif change != "touched":
        picture.write_bytes(b"longer" if change == "content" else b"two")
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "touched")))
    assert content(facts, picture)[1]


def test_nothing_is_known_of_a_file_that_was_changed_just_now(picture, monkeypatch):
    """Within a tick of the file system's clock it could change again and look the same."""
    monkeypatch.setattr(file_facts, "SETTLED", 60.0)
    facts = FileFacts()
    assert [content(facts, picture)[1] for _ in range(2)] == [True, True]


def test_a_file_that_changes_while_it_is_read_is_read_again(picture):
    facts = FileFacts()
    facts.of(picture, "content", lambda: picture.write_bytes(b"longer"))
    assert content(facts, picture) == ("longer", True)


def test_a_fault_is_not_remembered(picture):
    facts = FileFacts()
    with pytest.raises(ValueError, match="damaged"):
        facts.of(picture, "content", lambda: (_ for _ in ()).throw(ValueError("damaged")))
    assert content(facts, picture) == ("one", True)


def test_damaged_lines_are_nothing_known(tmp_path, picture):
    facts = FileFacts()
    content(facts, picture)
    facts.save(path := tmp_path / "files.jsonl")
    path.write_text('{"a": 1}\n[1]\n["x", 3, {}]\n' + path.read_text() + '["half')
    assert content(FileFacts.load([path]), picture) == ("one", False)
    path.write_bytes(b"\xff\xff")
    assert content(FileFacts.load([path]), picture) == ("one", True)


def test_processes_that_load_pictures_are_not_sent_all_of_it(picture):
    facts = FileFacts()
    content(facts, picture)
    assert len(pickle.dumps(facts)) < 100


def test_what_follows_from_a_key_is_found_once_for_the_last_key(tmp_path):
    facts = FileFacts()
    found = [facts.following("tokens", key, lambda key=key: [key]) for key in ("a", "b", "b")]
    facts.save(tmp_path / "files.jsonl")
    later = FileFacts.load([tmp_path / "files.jsonl"])
    assert found == [["a"], ["b"], ["b"]]
    assert later.following("tokens", "b", list) == ["b"] and later.following("tokens", "a", list) == []
