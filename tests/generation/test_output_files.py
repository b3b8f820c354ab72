"""picture_files.py: what a picture tells of itself, and the lists beside it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from data.image_files import find_image_files
from data.images import save_image
from data.metadata import read_captions
from generation.output_files import (
    OutputWriter,
    PlannedImage,
    found,
    is_intact_image,
    prepare_folder,
    read_image_rows,
    save_drawing,
    webui_parameters,
)
from runtime.errors import UserError, WorkError

SETTINGS = {
    "steps": 25, "scheduler": "dpmpp_2m_karras", "guidance": 7.0, "guidance_rescale": 0.0,
    "negative_prompt": "blurred", "height": 48, "width": 32, "token_chunks": 3, "dtype": "fp32",
    "safety_checker": False, "model": "out/jeans with a LoRA",
}  # fmt: skip


def drawing(prompt: str = "denim jeans", seed: int = 965400086, suffix: str = "png", **changes) -> PlannedImage:
    return PlannedImage(prompt, seed, {**SETTINGS, **changes}, "0123", "jeans, blue", suffix)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8))


def test_the_parameters_are_as_automatic1111_writes_them():
    assert webui_parameters(drawing()) == (
        "denim jeans\nNegative prompt: blurred\n"
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 32x48, "
        'Model: "jeans, blue"'
    )
    assert webui_parameters(drawing(negative_prompt="")).count("\n") == 1


def test_automatic1111s_way_of_reading_finds_every_value():
    """It splits the last line at commas outside quotes and wants at least three pairs."""
    last = webui_parameters(drawing("a: b, c\nsecond line")).rpartition("\n")[2]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs == {"Steps": "25", "Sampler": "DPM++ 2M Karras", "CFG scale": "7", "Seed": "965400086",
                     "Size": "32x48", "Model": '"jeans, blue"'}  # fmt: skip


@pytest.mark.parametrize("prompt", ["denim jeans", "jeans – größe 32, 牛仔裤"])
def test_a_png_tells_how_it_was_drawn(tmp_path, picture, prompt):
    path = save_drawing(picture, tmp_path, drawing(prompt))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture))
        assert image.text["parameters"] == webui_parameters(drawing(prompt))
        assert json.loads(image.text["text_to_image"]) == drawing(prompt).row(path.name)


def test_a_jpeg_tells_it_in_its_exif_comment(tmp_path, picture):
    path = save_drawing(picture, tmp_path, drawing("jeans – größe", suffix="jpg"))
    assert path.suffix == ".jpg"
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        assert comment[8:].decode("utf-16-be") == webui_parameters(drawing("jeans – größe"))
        assert json.loads(image.info["comment"]) == drawing("jeans – größe", suffix="jpg").row(path.name)


def test_another_picture_has_another_name_and_the_same_the_same():
    changes = [{"steps": 24}, {"scheduler": "ddim"}, {"negative_prompt": ""}, {"dtype": "bf16"}, {"height": 56}]
    others = [drawing("jeans"), drawing(seed=1), drawing(suffix="jpg"), *(drawing(**change) for change in changes)]
    others.append(PlannedImage("denim jeans", 965400086, SETTINGS, "4567", "jeans, blue"))
    assert len({one.file_name for one in [drawing(), *others]}) == len(others) + 1
    assert drawing(model="elsewhere").file_name == drawing().file_name
    assert drawing("../ä/é?*").file_name.startswith("ä-é-")


def folder_of(path: Path, plan: list[PlannedImage], metadata: bool = True) -> OutputWriter:
    return OutputWriter(path, plan, metadata, is_main=True)


def test_a_picture_has_one_row_in_the_order_of_the_plan(tmp_path, picture):
    plan = [drawing(), drawing(seed=2), drawing(seed=3)]
    for part in (plan[:2], [plan[2], plan[0]]):
        with folder_of(tmp_path, part) as folder:
            folder.add(part, [picture] * 2, [False] * 2)
    rows = read_image_rows(tmp_path / "images.jsonl")
    assert [row["seed"] for row in rows.values()] == [2, 3, 965400086]
    assert rows[drawing().file_name]["model_hash"] == "0123"


def test_a_withheld_picture_says_so_by_its_name_and_is_in_no_data_set(tmp_path, picture):
    """So it is known after a kill, and whichever process has drawn it."""
    plan = [drawing(), drawing(seed=2)]
    with folder_of(tmp_path, plan) as folder:
        folder.add(plan, [picture] * 2, [True, False])
    assert found(tmp_path, plan[0]).endswith("-withheld.png") and found(tmp_path, plan[1]) == plan[1].file_name
    there = folder_of(tmp_path, plan).list_pictures()
    assert list(there.values()) == [plan[0].withheld_name, plan[1].file_name]
    assert [row.get("withheld") for row in read_image_rows(tmp_path / "images.jsonl").values()] == [True, None]
    assert [row.file_name for row in read_captions(tmp_path)] == [plan[1].file_name]
    assert [path.name for path in find_image_files(tmp_path)] == [plan[1].file_name]


def test_the_folder_is_a_data_set_at_once(tmp_path, picture):
    drawn = [drawing("denim jeans, blue"), drawing("a \u2028 skirt", seed=2), drawing("", seed=3)]
    for _ in range(2):
        with folder_of(tmp_path, drawn) as folder:
            folder.add(drawn, [picture] * 3, [False] * 3)
    save_image(picture, tmp_path / "contact_sheet.jpg")
    wanted = {one.file_name: one.prompt for one in drawn[:2]}
    assert {row.file_name: row.captions[0] for row in read_captions(tmp_path)} == wanted
    assert {path.name for path in find_image_files(tmp_path)} == {one.file_name for one in drawn}
    loaded = load_dataset("imagefolder", data_dir=tmp_path, split="train", cache_dir=tmp_path / "cache")
    assert {text for text in loaded["text"] if text} == set(wanted.values())


def test_a_picture_that_is_cut_short_is_not_whole(tmp_path, picture):
    path = save_image(picture, tmp_path / "x.png")
    assert is_intact_image(path) and not is_intact_image(tmp_path / "y.png")
    path.write_bytes(path.read_bytes()[:-200])
    assert not is_intact_image(path)


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, picture):
    from socket import gethostname

    dead, alive = (tmp_path / f".x.png.{gethostname()}.{pid}.part" for pid in (2**22 + 1, 1))
    for path in (dead, alive):
        path.write_bytes(b"half")
    prepare_folder(tmp_path)
    assert not dead.exists() and alive.exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path, picture):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        prepare_folder(tmp_path / "file" / "pictures")
    with pytest.raises(WorkError, match="cannot be written"):
        save_image(picture, tmp_path / "file" / "x.png")
