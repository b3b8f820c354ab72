"""A captioned folder becomes pictures: checked all at once, with their captions, their trigger and their hash."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from captioned_folder import write_captioned_folder
from data.dataset import Picture, hash_dataset, read_pictures, with_trigger
from data.decoding import PIXEL_LIMIT
from metadata.files import MetadataFile
from runtime.errors import UserError


def write_bomb(path: Path, side: int) -> None:
    """A PNG of a few bytes that claims `side` x `side` pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    coded = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


def test_every_unusable_picture_is_named_at_once_with_its_line_and_what_is_wrong(tmp_path):
    captions = {"whole.jpg": "a", "cut.jpg": "b", "text.jpg": "c", "huge.png": "d", "vast.png": "e", "cut.png": "f"}
    folder = write_captioned_folder(tmp_path / "data", captions)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    (folder / "text.jpg").write_text("not a picture")
    write_bomb(folder / "huge.png", int(PIXEL_LIMIT**0.5) + 1)
    write_bomb(folder / "vast.png", 60_000)
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-900])
    with pytest.raises(UserError) as error:
        read_pictures(folder, short_captions=True)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ")[1] for line in lines] == ["cut.jpg", "text.jpg", "huge.png", "vast.png", "cut.png"]
    assert "line 2" in lines[0] and "damaged" in lines[0] and "not a picture" in lines[1]
    assert "limit" in lines[2] and "limit" in lines[3] and "damaged" in lines[4]


def test_short_forms_of_captions_can_be_left_out(captioned_folder):
    with_forms, without = (read_pictures(captioned_folder, short) for short in (True, False))
    assert "denim jeans" in with_forms[0].captions
    assert [len(picture.captions) for picture in without] == [1, 1, 1]


def test_a_list_of_captions_is_kept_whole(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "x"})
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": ["one cat", "two words"]}))
    assert set(read_pictures(folder, short_captions=False)[0].captions) == {"one cat", "two words"}


def test_the_hash_changes_with_a_pixel_and_with_a_caption(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.png": "a", "2.png": "b"})
    before = hash_dataset(read_pictures(folder, True))
    assert hash_dataset(read_pictures(folder, True)) == before
    assert hash_dataset(read_pictures(folder, True)[::-1]) != before
    image = Image.open(folder / "1.png").convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(folder / "1.png")
    changed = hash_dataset(read_pictures(folder, True))
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace('"b"', '"c"'))
    assert len({before, changed, hash_dataset(read_pictures(folder, True))}) == 3


def test_the_same_captions_in_another_file_are_the_same_data_set(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.png": "a", "2.png": "b"})
    inside = read_pictures(folder, True)
    elsewhere = (folder / "metadata.jsonl").rename(tmp_path / "mine.jsonl")
    outside = read_pictures(folder, True, files=[MetadataFile(elsewhere, folder)])
    assert outside == inside and hash_dataset(outside) == hash_dataset(inside)


def test_bad_rows_and_bad_pictures_are_listed_together(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"whole.jpg": "a", "cut.jpg": "b", "null.jpg": "c"})
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    rows = (folder / "metadata.jsonl").read_text().replace('"c"', "null")
    (folder / "metadata.jsonl").write_text(rows + '{"file_name": "whole.jpg"\n')
    with pytest.raises(UserError) as error:
        read_pictures(folder, short_captions=True)
    head, *lines = str(error.value).splitlines()
    assert head.startswith("3 bad rows")
    assert [line.strip().split(":")[0] for line in lines] == [f"metadata.jsonl, line {n}" for n in (2, 3, 4)]


def test_a_trigger_that_captions_have_already_leaves_their_shorter_forms_as_they_would_be(tmp_path):
    plain = write_captioned_folder(tmp_path / "plain", {"1.jpg": "A pair of jeans, blue. They are new."})
    there = write_captioned_folder(tmp_path / "there", {"1.jpg": "sks jeans, A pair of jeans, blue. They are new."})
    with_trigger = [read_pictures(folder, True, trigger="sks jeans")[0].captions for folder in (plain, there)]
    assert with_trigger[0] == with_trigger[1] and "sks jeans, A pair of jeans" in with_trigger[0]


def picture_of(caption: str, trigger: str | None = None) -> Picture:
    return Picture(Path("x"), 30, 40, ((caption,),), trigger)


@pytest.mark.parametrize(
    ("caption", "base_caption"),
    [
        ("sks jeans, a pair on white", "a pair on white"),
        ("sks jeans on a white background", "on a white background"),
        ("sks jeansy", "sks jeansy"),
        ("sks jeans", "sks jeans"),
        ("a pair", "a pair"),
    ],
)
def test_the_base_model_is_prompted_without_the_trigger(caption, base_caption):
    assert picture_of(caption, "sks jeans").base_caption == base_caption
    assert picture_of(caption).base_caption == caption


@pytest.mark.parametrize(
    ("caption", "triggered"),
    [
        ("a pair", "sks jeans, a pair"),
        ("sks jeans on white", "sks jeans on white"),
        ("sks jeansy", "sks jeans, sks jeansy"),
    ],
)
def test_a_trigger_stands_in_front_of_a_caption_once(caption, triggered):
    assert with_trigger(caption, "sks jeans") == triggered
    assert with_trigger(caption, None) == caption


def test_short_prompts_have_the_trigger_and_are_made_of_the_caption_without_it():
    short = ["jeans", "A pair of jeans on white"]
    assert picture_of("A pair of jeans on white, folded.").short_prompts == short
    triggered = picture_of("sks, A pair of jeans on white, folded.", "sks").short_prompts
    assert triggered == [f"sks, {prompt}" for prompt in short]


def test_the_hash_of_a_data_set_stays_what_it_was_or_old_runs_would_not_resume(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"some picture")
    groups = (("sks, A pair of jeans.",), ("sks, jeans", "sks, blue"))
    pictures = [Picture(tmp_path / "1.jpg", 30, 40, groups), Picture(tmp_path / "1.jpg", 30, 40, (("a",),), "sks")]
    assert hash_dataset(pictures) == "49d14fe31d6fa0acafe35bcbbb4c693ea2bb8e3c97176fbe319609c5cac5ed5c"
