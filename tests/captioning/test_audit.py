"""inspecting.py: what would spoil a training is found, what is right is not, among thousands of pictures too."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from captioning import audit as inspecting
from captioning.audit import ImageFacts, look_at, nearly_alike, run_audit, view
from captioning.caption_file import caption_file
from data.metadata_writer import append_captions
from img_captioning import DATASET, main, parse_args
from runtime.errors import WorkError


def draw(seed: int, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A picture of coloured blocks; no two seeds look alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        draw(number).save(tmp_path / f"{number}.png")
    append_captions(tmp_path, [(f"{number}.png", f"picture {number}") for number in range(3)])
    return tmp_path


def found(folder: Path) -> dict[str, list[str]]:
    """Texts by the first word of their kind."""
    file = caption_file(folder, None, False)
    kinds: dict[str, list[str]] = {}
    for finding in look_at(file, file.rows()):
        kinds.setdefault(finding.kind.partition(" (")[0], []).append(finding.text)
    return kinds


def test_a_folder_in_order_is_clean_and_so_is_the_repositorys(folder, capsys):
    assert found(folder) == {}
    main(parse_args(["--check"]))  # raises where something is wrong
    assert "nothing is wrong" in capsys.readouterr().out
    assert found(DATASET) == {}


def test_copies_are_found_whatever_their_format_and_near_copies_by_how_they_look(folder):
    draw(0).save(folder / "copy.bmp")
    near = ImageEnhance.Brightness(draw(1).resize((800, 600))).enhance(0.95)
    near.save(folder / "near.jpg", quality=60)
    files = [(name, name) for name in ("copy.bmp", "near.jpg")]
    append_captions(folder, files)
    kinds = found(folder)
    assert list(kinds) == ["the same picture twice", "nearly the same picture twice"]
    assert kinds["the same picture twice"] == ["copy.bmp = 0.png"]
    (text,) = kinds["nearly the same picture twice"]
    assert text.startswith("near.jpg ~ 1.png (")


def test_the_same_shape_in_another_colour_is_another_picture(tmp_path):
    for name, colour in (("red", (200, 30, 40)), ("blue", (40, 60, 220))):
        image = Image.new("RGB", (400, 400), "white")
        image.paste(colour, (60, 90, 330, 310))
        image.save(tmp_path / f"{name}.png")
    views = [view(path, path.name) for path in sorted(tmp_path.iterdir())]
    assert views[0].bits == views[1].bits and not list(nearly_alike(views))


def test_blurred_tiny_blank_and_broken_pictures_are_found(folder):
    photo = Image.open(DATASET / "11 (1).JPG").convert("RGB")
    photo.filter(ImageFilter.GaussianBlur(6)).save(folder / "blurred.jpg")
    photo.filter(ImageFilter.GaussianBlur(1)).save(folder / "soft.jpg")
    draw(5, (300, 200)).save(folder / "tiny.png")
    Image.new("RGB", (400, 400), "white").save(folder / "blank.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    files = ("blurred.jpg", "soft.jpg", "tiny.png", "blank.png", "broken.png")
    append_captions(folder, [(name, name) for name in files])
    kinds = found(folder)
    assert kinds.pop("tiny") == ["tiny.png: 300 x 200"]
    assert kinds.pop("of one colour all over") == ["blank.png"]
    assert [text.partition(":")[0] for text in kinds.pop("blurred")] == ["blurred.jpg"]
    assert kinds.pop("broken")[0].startswith("broken.png: damaged")
    assert list(kinds) == ["nearly the same picture twice"]  # the soft one and the blurred one


def test_pictures_on_white_are_not_called_blurred():
    for path in DATASET.glob("*.JPG"):
        assert view(path, path.name).blur < inspecting.BLURRED - 0.1


def test_how_blurred_a_picture_is_does_not_depend_on_its_size(tmp_path):
    photo = Image.open(DATASET / "11 (1).JPG").convert("RGB")
    large = photo.resize((2304, 3072), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
    large.save(tmp_path / "large.jpg")  # a radius of half a pixel where it is looked at
    assert abs(view(tmp_path / "large.jpg", "").blur - view(DATASET / "11 (1).JPG", "").blur) < 0.05


def test_rows_and_captions_that_training_refuses_are_found(folder):
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n{"file_name": "3.png", "text": " "}\n')
        file.write('{"file_name": "4.png", "text": ["y", "Picture  0"]}\n')
    for number in (3, 4, 5):
        draw(number).save(folder / f"{number}.png")
    assert found(folder) == {
        "rows without a picture": ['line 4: the picture "gone.png" is missing'],
        "rows without a caption": ["line 5: `text` is empty"],
        "equal captions": ["lines 1, 6: picture 0"],
        "pictures without a row": ["5.png"],
    }


def test_a_picture_turned_by_exif_is_noted_and_not_wrong(folder, capsys):
    exif = Image.Exif()
    exif[inspecting.EXIF_ORIENTATION] = 6
    draw(7).save(folder / "turned.jpg", exif=exif)
    append_captions(folder, [("turned.jpg", "turned")])
    run_audit(caption_file(folder, None, False))
    said = capsys.readouterr().out
    assert "nothing is wrong" in said and "turned by EXIF" in said and "turned.jpg" in said


def test_files_that_are_passed_over_are_named(folder, capsys):
    (folder / "phone.HEIC").touch()
    (folder / "below").mkdir()
    draw(7).save(folder / "below" / "7.png")
    draw(8).save(folder / "below" / "8.png")
    append_captions(folder, [("below/8.png", "one that somebody has captioned")])
    assert found(folder) == {
        "of a kind that cannot be read": ["phone.HEIC"],
        "in sub-folders, without a row": ["below/7.png"],
    }
    (folder / "phone.HEIC").unlink()
    main(parse_args(["--check", "--image_dir", str(folder)]))  # sub-folders may be left out on purpose
    assert "below/7.png" in capsys.readouterr().out


def test_what_is_wrong_is_listed_and_ends_in_exit_code_1(folder, capsys):
    shutil.copy(folder / "0.png", folder / "copy.png")
    with pytest.raises(WorkError, match="2 things are wrong with the data"):
        main(parse_args(["--image_dir", str(folder), "--check"]))
    assert "the same picture twice: 1\n    copy.png = 0.png" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("*.jsonl*")) == ["metadata.jsonl"]


def test_a_folder_of_broken_pictures_alone_is_looked_at(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_text("no picture")
    kinds = found(tmp_path)
    assert len(kinds.pop("broken")) == 2 and list(kinds) == ["pictures without a row"]
    with pytest.raises(WorkError, match="4 things are wrong with the data"):
        main(parse_args(["--image_dir", str(tmp_path), "--check"]))


def test_long_lists_are_cut_where_asked(capsys):
    inspecting.report([inspecting.Finding("broken", str(number)) for number in range(12)], most=10)
    said = capsys.readouterr().out
    assert "broken: 12" in said and "... and 2 more; --check lists all" in said and "11" not in said.split("more")[1]


def test_each_of_many_pictures_is_compared_with_each(monkeypatch):
    monkeypatch.setattr(inspecting, "PAIRS_AT_ONCE", 64)
    bits = np.random.default_rng(0).integers(0, 256, (1000, 32), dtype=np.uint8)
    bits[700], bits[999] = bits[3], bits[998]
    bits[999, :3] ^= 255
    bits[400] = bits[5]
    bits[400, :4] ^= 255  # 32 bits: too far
    views = [ImageFacts(str(number), bits=row.tobytes(), colour=(9.0, 9.0, 9.0)) for number, row in enumerate(bits)]
    alike = [(one.name, like.name, distance) for one, like, distance in nearly_alike(views)]
    assert alike == [("700", "3", 0), ("999", "998", 24)]
