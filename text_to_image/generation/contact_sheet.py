"""One sheet of many pictures, with prompt and seed below each."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data.decoding import open_picture

Colour = str | tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN, LINE, PROMPT_LINES = 16, 18, 3
FONT_SIZE, TITLE_SIZE = 13, 18
MIN_CELL = 200  # px; narrower pictures still have room for their text
MAX_PIXELS = 50_000_000  # of all pictures together, which are held in memory
MAX_SIDE = 16_000  # px; a JPEG's limit is 65,535, but viewers give up before that


class TextBox(NamedTuple):
    """Where text goes, in px; it has at most `lines` lines."""

    left: int
    top: int
    width: int
    lines: int = 1


def make_contact_sheet(
    paths: Sequence[Path], captions: Sequence[tuple[str, int]], title: str, columns: int | None = None
) -> Image.Image:
    """The pictures with `captions` (prompt, seed) below them and `title` on top, in `columns`; None: about 3:2.

    Pictures keep their size where the sheet has room for it. They are shrunk where there are hundreds, or where one
    is larger than the first.
    """
    width, height = _picture_size(paths)
    cell_width, cell_height = max(width, MIN_CELL) + MARGIN, height + MARGIN + (PROMPT_LINES + 1) * LINE
    columns = columns or best_columns(len(paths), cell_width, cell_height)
    rows, top = math.ceil(len(paths) / columns), 2 * MARGIN + TITLE_SIZE
    sheet = Image.new("RGB", (MARGIN + columns * cell_width, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    write_text(draw, TextBox(MARGIN, MARGIN, sheet.width - 2 * MARGIN), title, TITLE_SIZE, "black")
    for index, (path, (prompt, seed)) in enumerate(zip(paths, captions, strict=True)):
        left, upper = MARGIN + index % columns * cell_width, top + index // columns * cell_height
        _paste(sheet, path, (left, upper), (width, height))
        below, text_width = upper + height + 4, cell_width - MARGIN
        write_text(draw, TextBox(left, below, text_width), f"seed {seed}", FONT_SIZE, "black")
        write_text(draw, TextBox(left, below + LINE, text_width, PROMPT_LINES), prompt, FONT_SIZE, "dimgray")
    sheet.thumbnail((MAX_SIDE, MAX_SIDE))  # leaves a smaller one as it is
    return sheet


def _picture_size(paths: Sequence[Path]) -> tuple[int, int]:
    """(width, height) that each picture gets: the first one's size, or less where all would exceed MAX_PIXELS."""
    with open_picture(paths[0]) as first:
        width, height = first.size
    scale = min(1.0, math.sqrt(MAX_PIXELS / (len(paths) * width * height)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def _paste(sheet: Image.Image, path: Path, place: tuple[int, int], size: tuple[int, int]) -> None:
    with open_picture(path) as image:
        image.thumbnail(size)  # leaves a smaller one as it is
        sheet.paste(image, place)


def best_columns(pictures: int, cell_width: int, cell_height: int) -> int:
    """How many columns make the sheet about 3:2, at most one for each picture."""
    return min(pictures, max(1, round(math.sqrt(1.5 * pictures * cell_height / cell_width))))


def wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
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


def _cut(line: str, font: Font, width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2].rstrip() + "…"
    return line


def write_text(draw: ImageDraw.ImageDraw, box: TextBox, text: str, font_size: int, colour: Colour) -> None:
    font = ImageFont.load_default(font_size)
    for number, line in enumerate(wrap(text, font, box.width, box.lines)):
        draw.text((box.left, box.top + number * LINE), line, fill=colour, font=font)
