"""Pictures with their settings inside, and the lists beside them."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from data.images import save_image
from generation.output_files import (
    OutputWriter,
    find_file,
    is_intact_image,
    prepare_folder,
    read_image_rows,
    save_generated_image,
    webui_parameters,
)
from generation.planned_images import GeneratedBatch, PlannedImage
from metadata.image_files import find_image_files
from metadata.reading import read_captions
from planned_image import planned_image
from runtime.errors import UserError, WorkError


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8))


def test_the_parameters_have_automatic1111s_format():
    assert webui_parameters(planned_image()) == (
        "denim jeans\nNegative prompt: blurred\n"
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 32x48, "
        'Model: "jeans, blue"'
    )
    assert webui_parameters(planned_image(negative_prompt="")).count("\n") == 1


def test_automatic1111s_parser_finds_every_value():
    """It splits the last line at commas outside quotes and wants at least three pairs."""
    last = webui_parameters(planned_image("a: b, c\nsecond line")).rpartition("\n")[2]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs == {"Steps": "25", "Sampler": "DPM++ 2M Karras", "CFG scale": "7", "Seed": "965400086",
                     "Size": "32x48", "Model": '"jeans, blue"'}  # fmt: skip


@pytest.mark.parametrize("prompt", ["denim jeans", "jeans – größe 32, 牛仔裤"])
def test_a_png_has_its_settings_in_it(tmp_path, picture, prompt):
    path = save_generated_image(picture, tmp_path, planned_image(prompt))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture))
        assert image.text["parameters"] == webui_parameters(planned_image(prompt))
        assert json.loads(image.text["text_to_image"]) == planned_image(prompt).to_row(path.name)


def test_a_jpeg_has_its_settings_in_exif_and_comment(tmp_path, picture):
    path = save_generated_image(picture, tmp_path, planned_image("jeans – größe", extension="jpg"))
    assert path.suffix == ".jpg"
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        assert comment[8:].decode("utf-16-be") == webui_parameters(planned_image("jeans – größe"))
        assert json.loads(image.info["comment"]) == planned_image("jeans – größe", extension="jpg").to_row(path.name)


def writer_for(folder: Path, plan: list[PlannedImage]) -> OutputWriter:
    return OutputWriter(folder, plan, with_metadata=True, is_main=True)


def batch_of(plan: list[PlannedImage], picture: Image.Image, withheld: tuple[bool, ...] = ()) -> GeneratedBatch:
    return GeneratedBatch(plan, [picture] * len(plan), withheld or [False] * len(plan))


def test_a_picture_has_one_row_in_the_order_of_the_plan(tmp_path, picture):
    plan = [planned_image(), planned_image(seed=2), planned_image(seed=3)]
    for part in (plan[:2], [plan[2], plan[0]]):
        with writer_for(tmp_path, part) as writer:
            writer.add(batch_of(part, picture))
    rows = read_image_rows(tmp_path / "images.jsonl")
    assert [row["seed"] for row in rows.values()] == [2, 3, 965400086]
    assert rows[planned_image().file_name]["model_hash"] == "0123"


def test_a_withheld_picture_is_marked_by_its_name_and_is_in_no_data_set(tmp_path, picture):
    """So it is known after a kill, and whichever process generated it."""
    plan = [planned_image(), planned_image(seed=2)]
    with writer_for(tmp_path, plan) as writer:
        writer.add(batch_of(plan, picture, withheld=(True, False)))
    assert [find_file(tmp_path, image) for image in plan] == [plan[0].withheld_name, plan[1].file_name]
    assert list(writer_for(tmp_path, plan).update_lists().values()) == [plan[0].withheld_name, plan[1].file_name]
    assert [row.get("withheld") for row in read_image_rows(tmp_path / "images.jsonl").values()] == [True, None]
    assert [row.file_name for row in read_captions(tmp_path)] == [plan[1].file_name]
    assert [path.name for path in find_image_files(tmp_path)] == [plan[1].file_name]


def test_the_folder_is_a_data_set(tmp_path, picture):
    plan = [planned_image("denim jeans, blue"), planned_image("a \u2028 skirt", seed=2), planned_image("", seed=3)]
    for _ in range(2):
        with writer_for(tmp_path, plan) as writer:
            writer.add(batch_of(plan, picture))
    save_image(picture, tmp_path / "contact_sheet.jpg")
    wanted = {image.file_name: image.prompt for image in plan[:2]}
    assert {row.file_name: row.captions[0] for row in read_captions(tmp_path)} == wanted
    assert {path.name for path in find_image_files(tmp_path)} == {image.file_name for image in plan}
    loaded = load_dataset("imagefolder", data_dir=tmp_path, split="train", cache_dir=tmp_path / "cache")
    assert {text for text in loaded["text"] if text} == set(wanted.values())


def test_a_truncated_picture_is_not_intact(tmp_path, picture):
    path = save_image(picture, tmp_path / "x.png")
    assert is_intact_image(path) and not is_intact_image(tmp_path / "y.png")
    path.write_bytes(path.read_bytes()[:-200])
    assert not is_intact_image(path)


def test_partial_files_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path, picture):
    from socket import gethostname

    dead, alive = (tmp_path / f".x.png.{gethostname()}.{pid}.part" for pid in (2**22 + 1, 1))
    for path in (dead, alive):
        path.write_bytes(b"half")
    prepare_folder(tmp_path)
    assert not dead.exists() and alive.exists()


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path, picture):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        prepare_folder(tmp_path / "file" / "pictures")
    with pytest.raises(WorkError, match="cannot be written"):
        save_image(picture, tmp_path / "file" / "x.png")


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_a_picture_that_the_disk_takes_only_a_part_of_is_refused_and_leaves_nothing(tmp_path, picture, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(WorkError, match=rf"{name} .*needs .* free"):
            save_image(picture, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
