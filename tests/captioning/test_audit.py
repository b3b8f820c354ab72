"""The audit behind --check: what would spoil a training is found, and what is right is not reported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from captioning.audit import Finding, find_faults, print_findings, run_audit
from captioning.caption_file import locate_caption_file
from data.images import EXIF_ORIENTATION
from img_captioning import DATASET, caption_or_check, parse_args
from metadata.writer import append_captions
from runtime.errors import WorkError


def picture(seed: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A picture of coloured blocks; no two seeds look alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    append_captions(tmp_path, [(f"{number}.png", f"picture {number}") for number in range(3)])
    return tmp_path


def found(folder: Path) -> dict[str, list[str]]:
    """The texts of all findings by their kind, without what that says in brackets."""
    kinds: dict[str, list[str]] = {}
    for finding in find_faults(locate_caption_file(folder, None, False)):
        kinds.setdefault(finding.kind.partition(" (")[0], []).append(finding.text)
    return kinds


def test_nothing_is_found_in_a_folder_in_order_nor_in_the_repositorys(folder, capsys):
    assert found(folder) == {}
    caption_or_check(parse_args(["--check"]))  # raises where something is wrong
    assert "nothing is wrong" in capsys.readouterr().out
    assert found(DATASET) == {}


def test_copies_are_found_whatever_their_format_and_near_copies_by_how_they_look(folder):
    picture(0).save(folder / "copy.bmp")
    near = ImageEnhance.Brightness(picture(1).resize((800, 600))).enhance(0.95)
    near.save(folder / "near.jpg", quality=60)
    files = [(name, name) for name in ("copy.bmp", "near.jpg")]
    append_captions(folder, files)
    kinds = found(folder)
    assert list(kinds) == ["the same picture twice", "nearly the same picture twice"]
    assert kinds["the same picture twice"] == ["copy.bmp = 0.png"]
    (text,) = kinds["nearly the same picture twice"]
    assert text.startswith("near.jpg ~ 1.png (")


def test_blurred_tiny_blank_and_broken_pictures_are_found(folder):
    photo = Image.open(DATASET / "11 (1).JPG").convert("RGB")
    photo.filter(ImageFilter.GaussianBlur(6)).save(folder / "blurred.jpg")
    photo.filter(ImageFilter.GaussianBlur(1)).save(folder / "soft.jpg")
    picture(5, (300, 200)).save(folder / "tiny.png")
    Image.new("RGB", (400, 400), "white").save(folder / "blank.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    files = ("blurred.jpg", "soft.jpg", "tiny.png", "blank.png", "broken.png")
    append_captions(folder, [(name, name) for name in files])
    kinds = found(folder)
    assert kinds.pop("tiny") == ["tiny.png: 300 x 200"]
    assert kinds.pop("blank") == ["blank.png"]
    assert [text.partition(":")[0] for text in kinds.pop("blurred")] == ["blurred.jpg"]
    assert kinds.pop("broken")[0].startswith("broken.png: damaged")
    assert list(kinds) == ["nearly the same picture twice"]  # the soft one and the blurred one


def test_a_grey_of_fewer_bits_than_its_file_has_is_called_nearly_black(folder):
    grey = np.asarray(picture(6).convert("L"), dtype=np.uint16)
    Image.fromarray(grey * 16).save(folder / "twelve.png")
    Image.fromarray(grey * 257).save(folder / "sixteen.png")
    append_captions(folder, [(name, name) for name in ("twelve.png", "sixteen.png")])
    kinds = found(folder)
    [dark] = kinds.pop("nearly black")
    assert dark.startswith("twelve.png: at most 1")


def frames(path: Path, *images: Image.Image) -> str:
    images[0].save(path, save_all=True, append_images=images[1:])
    return path.name


def test_an_animation_is_noted_and_one_that_begins_empty_is_wrong(folder):
    clear = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    names = [frames(folder / f"empty.{kind}", clear, picture(6), picture(7)) for kind in ("gif", "png", "webp")]
    names.append(frames(folder / "whole.gif", picture(8), picture(9)))
    append_captions(folder, [(name, name) for name in names])
    kinds = found(folder)
    assert [text.split(": the empty first frame")[0] for text in kinds.pop("blank")] == sorted(names[:3])
    assert set(kinds.pop("of several frames or pages")) == set(names)
    picture(5).save(folder / "phone.jpg", "MPO", save_all=True, append_images=[picture(6)])
    assert set(found(folder)["of several frames or pages"]) == set(names)


def test_a_picture_with_another_suffix_is_passed_over_by_name_and_measured_where_it_has_a_row(folder):
    for name, number in (("a.jpg_large", 6), ("b.jpg_large", 7)):
        picture(number).save(folder / name, "JPEG")
    (folder / "c.heic").write_bytes(b"no picture")
    append_captions(folder, [("b.jpg_large", "one with a row"), ("c.heic", "one that training refuses")])
    kinds = found(folder)
    assert kinds.pop("in a format that cannot be read") == ["a.jpg_large"]
    assert kinds.pop("broken")[0].startswith("c.heic: ") and kinds == {}


def test_rows_and_captions_that_training_refuses_are_found(folder):
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n{"file_name": "3.png", "text": " "}\n')
        file.write('{"file_name": "4.png", "text": ["y", "Picture  0"]}\n')
    for number in (3, 4, 5):
        picture(number).save(folder / f"{number}.png")
    assert found(folder) == {
        "rows without a picture": ['line 4: the picture "gone.png" is missing'],
        "rows without a caption": ["line 5: `text` is empty"],
        "equal captions": ["lines 1, 6: picture 0"],
        "pictures without a row": ["5.png"],
    }


def test_a_picture_rotated_by_exif_is_noted_and_not_wrong(folder, capsys):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture(7).save(folder / "turned.jpg", exif=exif)
    append_captions(folder, [("turned.jpg", "turned")])
    run_audit(locate_caption_file(folder, None, False))
    said = capsys.readouterr().out
    assert "nothing is wrong" in said and "rotated by EXIF" in said and "turned.jpg" in said


def test_files_that_are_not_captioned_are_named(folder, capsys):
    (folder / "phone.HEIC").touch()
    (folder / "below").mkdir()
    picture(7).save(folder / "below" / "7.png")
    picture(8).save(folder / "below" / "8.png")
    append_captions(folder, [("below/8.png", "one that somebody has captioned")])
    assert found(folder) == {
        "in a format that cannot be read": ["phone.HEIC"],
        "in sub-folders, without a row": ["below/7.png"],
    }
    (folder / "phone.HEIC").unlink()
    caption_or_check(parse_args(["--check", "--image_dir", str(folder)]))  # sub-folders may be left out on purpose
    assert "below/7.png" in capsys.readouterr().out


def test_masks_are_no_pictures_and_those_that_training_refuses_are_named(folder):
    mask = Image.new("L", (400, 300), 255)
    mask.save(folder / "0.mask.png")
    assert found(folder) == {}
    mask.crop((0, 0, 300, 300)).save(folder / "1.mask.png")
    mask.save(folder / "7.mask.png")
    kinds = found(folder)
    assert kinds.keys() == {"masks that cannot be used"}
    assert [Path(text.split(": ")[0]).name for text in kinds["masks that cannot be used"]] == [
        "7.mask.png",
        "1.mask.png",
    ]


def test_every_picture_that_a_row_names_is_measured(folder):
    for name in ("rowed", "own"):
        (folder / name).mkdir()
        (folder / name / "junk.jpg").write_bytes(b"no picture")
    append_captions(folder, [("rowed/junk.jpg", "one of this folder's rows")])
    append_captions(folder / "own", [("junk.jpg", "one of a file in a sub-folder")])
    kinds = found(folder)
    assert [text.split(":")[0] for text in kinds.pop("broken")] == ["rowed/junk.jpg", "own/junk.jpg"] and not kinds


def test_what_is_wrong_is_listed_and_ends_in_exit_code_1(folder, capsys):
    shutil.copy(folder / "0.png", folder / "copy.png")
    with pytest.raises(WorkError, match="2 things are wrong with the data"):
        caption_or_check(parse_args(["--image_dir", str(folder), "--check"]))
    assert "the same picture twice: 1\n    copy.png = 0.png" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("*.jsonl*")) == ["metadata.jsonl"]


def test_a_folder_of_broken_pictures_alone_is_checked(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_text("no picture")
    kinds = found(tmp_path)
    assert len(kinds.pop("broken")) == 2 and list(kinds) == ["pictures without a row"]
    with pytest.raises(WorkError, match="4 things are wrong with the data"):
        caption_or_check(parse_args(["--image_dir", str(tmp_path), "--check"]))


def test_of_very_many_pictures_a_part_is_opened_and_it_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr("captioning.audit.MOST_MEASURED", 2)
    (folder / "1.png").write_bytes(b"rubbish")  # the one in between
    kinds = found(folder)
    assert kinds == {"a sample of the pictures": ["2 of 3 were opened and compared"]}
    run_audit(locate_caption_file(folder, None, False))
    assert "nothing is wrong" in capsys.readouterr().out


def test_long_lists_are_cut_to_the_limit(capsys):
    print_findings([Finding("broken", str(number)) for number in range(12)], limit=10)
    said = capsys.readouterr().out
    assert "broken: 12" in said and "... and 2 more; --check lists all" in said and "11" not in said.split("more")[1]
