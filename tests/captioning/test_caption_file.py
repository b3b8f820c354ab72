"""Where captions go, which names pictures have there, and what a killed run leaves behind."""

from pathlib import Path

import pytest

from captioning.caption_file import CaptionFile, locate_caption_file, remove_partial_caption_files
from runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.webp", "sub/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def locate(folder: Path, output: Path | None = None, recursive: bool = False) -> CaptionFile:
    return locate_caption_file(folder, output, recursive)


def names(file, paths) -> list[str]:
    return [file.name_of(path) for path in paths]


def all_names(*where: object) -> list[str]:
    file = locate(*where)
    return names(file, file.pictures())


def test_names_are_from_the_folder_but_in_a_metadata_file_above_it_from_there(folder, monkeypatch):
    sub = folder / "sub"
    assert all_names(sub) == ["d.jpg"]
    assert all_names(folder, None, True) == ["a.jpg", "b.PNG", "c.webp", "sub/d.jpg"]
    assert all_names(sub, folder / "metadata.jsonl") == ["sub/d.jpg"]
    assert all_names(sub, folder / "captions.jsonl") == ["d.jpg"]
    monkeypatch.chdir(sub)
    assert all_names(Path("."), folder / "metadata.jsonl") == ["sub/d.jpg"]
    assert all_names(sub, Path("metadata.jsonl")) == ["d.jpg"]
    with pytest.raises(UserError, match="--output .*: a folder"):
        locate(folder, sub)


def test_half_written_files_of_a_killed_run_are_removed_and_no_others(folder):
    ours = [".metadata.jsonl.host.1.part", "..metadata.jsonl.replacing.host.1.part"]
    others = [".metadata.jsonl.lock.host.2.part", ".other.jsonl.host.1.part", "metadata.jsonl.part"]
    for name in [*ours, *others]:
        (folder / name).touch()
    remove_partial_caption_files(locate(folder))
    assert {path.name for path in folder.glob("*.part")} | {path.name for path in folder.glob(".*.part")} == set(
        others
    )


def test_half_written_files_of_what_a_link_leads_to_are_removed_too(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "captions of mine").touch()
    (folder / "metadata.jsonl").symlink_to(elsewhere / "captions of mine")
    (elsewhere / ".captions of mine.host.1.part").touch()
    (elsewhere / ".metadata.jsonl.host.1.part").touch()  # of another file
    remove_partial_caption_files(locate(folder))
    assert sorted(path.name for path in elsewhere.iterdir()) == [".metadata.jsonl.host.1.part", "captions of mine"]
