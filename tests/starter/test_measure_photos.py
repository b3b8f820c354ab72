"""The measurement of one's own photographs: its sheet, and an entry point that fails ends it."""

import pytest
from PIL import Image

from measure_photos import CELL, make_sheet, run_script
from runtime.errors import WorkError


def test_the_sheet_has_the_photographs_above_and_the_generated_pictures_below(tmp_path):
    photos = [tmp_path / f"{i}.png" for i in range(9)]
    for photo in photos:
        Image.new("RGB", (300, 200), "red").save(photo)
    sheet = make_sheet(photos, [Image.new("RGB", (64, 64), "blue")] * 3)
    assert sheet.size == (8 * CELL, 3 * CELL + 8)
    middle = CELL // 2
    assert sheet.getpixel((20, 40)) == sheet.getpixel((20, CELL + 40)) == (255, 0, 0)
    assert sheet.getpixel((20, 2 * CELL + 8 + 20)) == (0, 0, 255)
    assert sheet.getpixel((7 * CELL + middle, 2 * CELL + 8 + middle)) == (255, 255, 255)


def test_a_script_that_fails_ends_the_measurement(capfd):
    with pytest.raises(WorkError, match=r"no_such_script\.py.*2"):
        run_script("no_such_script.py")
    assert "no_such_script" in capfd.readouterr().err
