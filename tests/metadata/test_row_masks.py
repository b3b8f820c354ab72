"""The key `mask` of a row: which file it may name, and that a file that it names is no picture."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

from captioned_folder import READING, write_captioned_folder
from captioning.audit import find_faults
from captioning.caption_file import locate_caption_file
from data.captioned_folders import read_dataset
from data.dataset import hash_dataset, read_pictures, with_masks
from evaluation.copies import training_pictures
from metadata.reading import read_captions, scan_captions
from runtime.errors import UserError


def write_mask(path: Path, size=(48, 64), white=255) -> Path:
    path.parent.mkdir(exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(white, (0, 0, 24, 32))
    mask.save(path)
    return path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def name_mask(folder: Path, mask: object) -> None:
    """In the row of the first of two pictures."""
    write_rows(folder, [{"file_name": "1.jpg", "text": "a", "mask": mask}, {"file_name": "2.jpg", "text": "b"}])


@pytest.fixture
def folder(tmp_path):
    """Two pictures; the row of the first names a mask."""
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "a", "2.jpg": "b"})
    write_mask(folder / "masks" / "1.png")
    name_mask(folder, "masks/1.png")
    return folder


def masks_in(folder: Path) -> dict[str, str]:
    pictures = with_masks(folder, read_pictures(folder, short_captions=False), from_alpha=False)
    return {p.path.name: str(p.mask.path.relative_to(folder)) for p in pictures if p.mask}


def test_a_row_names_the_mask_of_its_picture(folder):
    before = hash_dataset(with_masks(folder, read_pictures(folder, False), False))
    assert masks_in(folder) == {"1.jpg": "masks/1.png"}
    name_mask(folder, None)
    assert masks_in(folder) == {}
    assert hash_dataset(with_masks(folder, read_pictures(folder, False), False)) != before


def test_a_csv_has_a_column_for_it(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,mask\n1.jpg,a,\n2.jpg,b,masks/1.png\n")
    assert masks_in(folder) == {"2.jpg": "masks/1.png"}


@pytest.mark.parametrize(
    ("value", "culprit"),
    [(3, "`mask`"), (["masks/1.png"], "`mask`"), ("masks/3.png", "masks/3.png"), ("../1.png", "`mask`"),
     ("/etc/passwd", "`mask`"), ("masks", "masks"), ("masks/a\0b.png", "`mask`")],
)  # fmt: skip
def test_a_mask_that_is_no_file_of_the_folder_is_named_with_its_line(folder, value, culprit):
    write_rows(folder, [{"file_name": "1.jpg", "text": "a"}, {"file_name": "2.jpg", "text": "b", "mask": value}])
    with pytest.raises(UserError, match=f"line 2: .*{culprit}"):
        read_captions(folder)
    assert [row.mask_fault is None for row in scan_captions(folder)] == [True, False]
    found = find_faults(locate_caption_file(folder, None, recursive=False))
    assert [f.text for f in found if f.kind == "masks that cannot be used"][0].startswith("line 2: ")
    assert not [f for f in found if f.kind == "rows without a picture"]


def test_two_masks_of_a_picture_are_refused_by_name_and_one_that_is_named_twice_is_one(folder):
    write_mask(folder / "1.mask.png")
    with pytest.raises(UserError, match=r"masks/1\.png.*1\.mask\.png.*two masks of 1\.jpg"):
        masks_in(folder)
    name_mask(folder, "1.mask.png")
    assert masks_in(folder) == {"1.jpg": "1.mask.png"}


def test_the_mask_of_another_name_may_be_named(folder):
    write_mask(folder / "shared.mask.png")
    write_rows(folder, [{"file_name": f"{i}.jpg", "text": "ab"[i - 1], "mask": "shared.mask.png"} for i in (1, 2)])
    assert masks_in(folder) == {"1.jpg": "shared.mask.png", "2.jpg": "shared.mask.png"}


def test_a_picture_with_a_row_is_no_mask(folder):
    name_mask(folder, "2.jpg")
    with pytest.raises(UserError, match=r"2\.jpg.*`mask` of 1\.jpg"):
        masks_in(folder)


@pytest.mark.parametrize("change", [{"size": (64, 48)}, {"white": 0}])
def test_check_names_a_mask_that_cannot_be_used(folder, change):
    write_mask(folder / "masks" / "1.png", **change)
    found = find_faults(locate_caption_file(folder, None, recursive=False))
    assert [f.text for f in found if f.kind == "masks that cannot be used" and "masks/1.png" in f.text]


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("place", ["masks/1.png", "1_m.png"])
def test_a_mask_is_never_taken_for_a_picture(folder, recursive, place):
    (folder / "masks" / "1.png").rename(folder / place)
    name_mask(folder, place)
    file = locate_caption_file(folder, None, recursive)
    assert file.pending("keep") == [] and [path.name for path in file.pending("replace")] == ["1.jpg", "2.jpg"]
    elsewhere = locate_caption_file(folder, folder.parent / "captions.jsonl", recursive)
    assert [path.name for path in elsewhere.pending("keep")] == ["1.jpg", "2.jpg"]
    assert not [f for f in find_faults(file) if Path(place).name in f.text]
    assert [path.name for path in training_pictures(folder)] == ["1.jpg", "2.jpg"]
    assert read_dataset(READING, Accelerator(cpu=True), [folder]).without_caption == []


def test_a_row_of_a_sub_folder_names_its_mask_from_there_and_may_not_contradict_another(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "a"})
    sub = write_captioned_folder(folder / "sub", {"2.jpg": "b"})
    write_mask(sub / "masks" / "2.png")
    write_rows(sub, [{"file_name": "2.jpg", "text": "b", "mask": "masks/2.png"}])
    row = {"file_name": "sub/2.jpg", "text": "b", "mask": "sub/masks/2.png"}
    write_rows(folder, [{"file_name": "1.jpg", "text": "a"}, row])
    assert masks_in(folder) == {"2.jpg": "sub/masks/2.png"}
    write_rows(folder, [{"file_name": "1.jpg", "text": "a"}, row | {"mask": None}])
    with pytest.raises(UserError, match="`mask`"):
        read_captions(folder)
