"""The sheet of pairs shows both pictures of each, frames copies in red, and stays of a size that can be opened."""

from PIL import Image

from evaluation.copies_sheet import COPY_COLOUR, MOST_PAIRS, make_copies_sheet


def colours(sheet: Image.Image) -> dict:
    return {colour: number for number, colour in sheet.getcolors(1 << 24)}


def pair(is_copy: bool):
    pictures = Image.new("RGB", (75, 100), (10, 0, 0)), Image.new("RGB", (300, 400), (0, 20, 0))
    return (*pictures, "0.012 from 1.png", is_copy)


def test_both_pictures_of_each_pair_are_on_it_at_one_size():
    found = colours(make_copies_sheet([pair(False)] * 3, 0.06))
    assert found[10, 0, 0] == found[0, 20, 0] == 3 * 150 * 200


def test_a_copy_is_framed_and_others_are_not():
    assert colours(make_copies_sheet([pair(True)], 0.06))[COPY_COLOUR] > 1000
    assert COPY_COLOUR not in colours(make_copies_sheet([pair(False)], 0.06))


def test_of_many_pairs_the_first_are_shown():
    sheet = make_copies_sheet([pair(False)] * 500, 0.06)
    assert colours(sheet)[10, 0, 0] == MOST_PAIRS * 150 * 200
    assert max(sheet.size) < 5000
