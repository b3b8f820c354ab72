"""One sheet of many pictures, each with its prompt and seed beneath it."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, PROMPT_LINES = 16, 18, 3
FONT_SIZE, TITLE_SIZE = 13, 18
MIN_CELL = 200  # px; narrower pictures leave room for their words
MAX_PIXELS = 50_000_000  # of all pictures together; they are kept in memory
MAX_SIDE = 16_000  # px; a JPEG's side is at most 65,535, and viewers give up before that


def make_contact_sheet(paths: Sequence[Path], captions: Sequence[tuple[str, int]], title: str) -> Image.Image:
    """The pictures in about as many columns as rows, (prompt, seed) beneath each, `title` on top.

    At their size where the sheet has room for it: hundreds are made smaller, and so is one larger than the first.
    """
    width, height = _cell_of(paths)
    cell_width, cell_height = max(width, MIN_CELL) + MARGIN, height + MARGIN + (PROMPT_LINES + 1) * LINE
    columns = best_columns(len(paths), cell_width, cell_height)
    rows, top = math.ceil(len(paths) / columns), 2 * MARGIN + TITLE_SIZE
    sheet = Image.new("RGB", (MARGIN + columns * cell_width, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    write_text(draw, (MARGIN, MARGIN), title, TITLE_SIZE, "black", sheet.width - 2 * MARGIN, lines=1)
    for index, (path, (prompt, seed)) in enumerate(zip(paths, captions, strict=True)):
        left = MARGIN + index % columns * cell_width
        upper = top + index // columns * cell_height
        with Image.open(path) as image:
            image.thumbnail((width, height))  # leaves a smaller one as it is
            sheet.paste(image, (left, upper))
        below = upper + height + 4
        write_text(draw, (left, below), f"seed {seed}", FONT_SIZE, "black", cell_width - MARGIN, lines=1)
        write_text(draw, (left, below + LINE), prompt, FONT_SIZE, "dimgray", cell_width - MARGIN, PROMPT_LINES)
    return _at_most(sheet, MAX_SIDE)


def _cell_of(paths: Sequence[Path]) -> tuple[int, int]:
    """(width, height) that each picture gets: the first one's size, as far as MAX_PIXELS allow for all of them."""
    with Image.open(paths[0]) as first:
        width, height = first.size
    scale = min(1.0, math.sqrt(MAX_PIXELS / (len(paths) * width * height)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def best_columns(pictures: int, cell_width: int, cell_height: int) -> int:
    """The number of columns that makes the sheet about 3:2, and no wider than its pictures."""
    return min(pictures, max(1, round(math.sqrt(1.5 * pictures * cell_height / cell_width))))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` broken at spaces into at most `lines` lines of `width` px, with an ellipsis where it is cut."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " …"]
    return [_cut(line, font, width) for line in wrapped]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2].rstrip() + "…"
    return line


def write_text(draw: ImageDraw.ImageDraw, place, text: str, size: int, colour, width: int, lines: int) -> None:
    """At most `lines` lines of `width` px below each other, from `place` on."""
    font = ImageFont.load_default(size)
    for number, line in enumerate(wrap(text, font, width, lines)):
        draw.text((place[0], place[1] + number * LINE), line, fill=colour, font=font)


def _at_most(sheet: Image.Image, side: int) -> Image.Image:
    sheet.thumbnail((side, side))  # leaves a smaller one as it is
    return sheet
