"""One sheet of pairs 'generated | nearest training picture', the nearest first, copies framed in red."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from generation.contact_sheet import FONT_SIZE, LINE, MARGIN, TITLE_SIZE, TextBox, best_columns, write_text

CELL = (150, 200)  # px, of one picture; it keeps its shape in it
PAIR = (2 * CELL[0] + 2, CELL[1])
MOST_PAIRS = 96
COPY_COLOUR = (200, 0, 0)

Pair = tuple[Image.Image, Image.Image, str, bool]  # generated, nearest, words below them, is it a copy


def make_copies_sheet(pairs: Sequence[Pair], limit: float) -> Image.Image:
    """The first 96 of `pairs` at most, row by row."""
    shown = pairs[:MOST_PAIRS]
    width, height = PAIR[0] + MARGIN, PAIR[1] + LINE + MARGIN
    columns = best_columns(len(shown), width, height)
    top = 2 * MARGIN + TITLE_SIZE
    size = (MARGIN + columns * width, top + math.ceil(len(shown) / columns) * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    title = f"generated | nearest, {len(shown)} of {len(pairs)}; copies: within {limit:.3f}"
    write_text(draw, TextBox(MARGIN, MARGIN, sheet.width - 2 * MARGIN), title, TITLE_SIZE, "black")
    for index, pair in enumerate(shown):
        place = MARGIN + index % columns * width, top + index // columns * height
        _lay(sheet, draw, place, pair)
    return sheet


def _lay(sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], pair: Pair) -> None:
    left, upper = place
    generated, nearest, words, is_copy = pair
    for offset, picture in ((0, generated), (CELL[0] + 2, nearest)):
        sheet.paste(ImageOps.pad(picture, CELL, color="white"), (left + offset, upper))
    colour = COPY_COLOUR if is_copy else "gainsboro"
    draw.rectangle((left - 2, upper - 2, left + PAIR[0] + 1, upper + PAIR[1] + 1), outline=colour, width=2)
    below, ink = TextBox(left, upper + PAIR[1] + 3, PAIR[0]), COPY_COLOUR if is_copy else "black"
    write_text(draw, below, words, FONT_SIZE, ink)
