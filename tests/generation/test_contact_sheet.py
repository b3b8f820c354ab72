"""The contact sheet has every picture at its size, with its prompt and seed."""

import pytest
from PIL import Image, ImageFont

from generation.contact_sheet import MARGIN, best_columns, make_contact_sheet, wrap


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (224, 288), (10 + i, 0, 0)).save(path)
    return paths


def test_every_picture_is_on_the_sheet_at_its_size(pictures):
    sheet = make_contact_sheet(pictures, [("denim jeans", i) for i in range(5)], "a model")
    colours = {colour: number for number, colour in sheet.getcolors(1 << 24)}
    assert all(colours[10 + i, 0, 0] == 224 * 288 for i in range(5))


def test_hundreds_of_pictures_are_shrunk(pictures, monkeypatch):
    monkeypatch.setattr("generation.contact_sheet.MAX_PIXELS", 5 * 112 * 144)
    sheet = make_contact_sheet(pictures, [("denim jeans", i) for i in range(5)], "a model")
    colours = {colour: number for number, colour in sheet.getcolors(1 << 24)}
    assert all(colours[10 + i, 0, 0] == 112 * 144 for i in range(5))


def test_text_is_below_each_picture_and_within_its_margins(pictures):
    sheet = make_contact_sheet(pictures[:1], [("denim jeans " * 40, 7)], "a model")
    below = sheet.crop((0, sheet.height - 70, sheet.width, sheet.height))
    assert below.convert("L").getextrema()[0] < 128
    right = sheet.crop((sheet.width - MARGIN + 1, 0, sheet.width, sheet.height))
    assert right.convert("L").getextrema() == (255, 255)


def test_text_is_wrapped_within_its_width_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(13)
    lines = wrap("A single pair of denim jeans laid flat on a white background " * 3, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert wrap("denim jeans", font, 200, 3) == ["denim jeans"]
    assert font.getlength(wrap("x" * 500, font, 200, 1)[0]) <= 200


def test_columns_make_the_sheet_about_three_to_two():
    assert [best_columns(n, 240, 376) for n in (1, 2, 3, 4, 16)] == [1, 2, 3, 3, 6]
