"""What check_copies.py reports: the lines it prints, and a sheet of pairs 'generated | nearest training picture'."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from evaluation.calibration import DistanceScale
from generation.contact_sheet import FONT_SIZE, LINE, MARGIN, TITLE_SIZE, TextBox, best_columns, write_text
from runtime.errors import escape_control_chars

CELL = (150, 200)  # px of one picture, which keeps its aspect ratio
PAIR = (2 * CELL[0] + 2, CELL[1])
MAX_PAIRS = 96
COPY_COLOUR = (200, 0, 0)


@dataclass(frozen=True)
class NearestMatch:
    """A generated picture and the training picture nearest to it."""

    generated: Path
    training: Path
    distance: float
    is_copy: bool
    training_name: str  # its file name, with folders where other training pictures have the same


@dataclass(frozen=True)
class Diversity:
    """How much pictures differ from each other."""

    mean_distance: float | None  # of all pairs; None for a single picture
    compared: int
    total: int


@dataclass(frozen=True)
class CopyReport:
    """The result of a check."""

    matches: Sequence[NearestMatch]  # the nearest first
    scale: DistanceScale
    generated: Diversity
    training: Diversity

    @property
    def copies(self) -> int:
        return sum(match.is_copy for match in self.matches)


# --- printed --------------------------------------------------------------------------------------------------------


def print_report(report: CopyReport) -> None:
    _print_scale(report.scale, report.training.total)
    _print_matches(report.matches)
    print()
    _print_diversity("generated", report.generated)
    _print_diversity("training", report.training)


def _print_scale(scale: DistanceScale, training_pictures: int) -> None:
    measured = len(scale.to_known_copies)
    if measured < training_pictures:
        print(f"distances are calibrated on {measured} of the {training_pictures} training pictures, evenly spaced")
    print("copies made on purpose (mirrored and blurred; moved and recoloured; smaller and lighter; rotated by 1°):")
    found = int((scale.to_known_copies <= scale.limit).sum())
    print(f"  up to {np.median(scale.to_known_copies):.3f} from their original (median);", end=" ")
    print(f"for {found} of {measured} training pictures all of them are found")
    if scale.to_nearest_other.size:
        mistaken = int((scale.to_nearest_other <= scale.limit).sum())
        print(f"the nearest other training picture: {np.median(scale.to_nearest_other):.3f} away (median);", end=" ")
        print(f"{mistaken} of {measured} would count as copies")
    print(f"a generated picture within {scale.limit:.3f} of a training picture counts as a copy")
    if scale.is_inconclusive:
        print("training pictures are as similar to each other as copies are: look at the sheet, the count says little")


def _print_matches(matches: Sequence[NearestMatch]) -> None:
    width = max(len("nearest training picture"), *(len(match.training_name) for match in matches))
    print(f"\ndistance        {'nearest training picture':<{width}}  generated")
    for match in matches:
        verdict = "copy" if match.is_copy else ""
        row = f"{match.distance:8.3f}  {verdict:<4}  {match.training_name:<{width}}  {match.generated.name}"
        print(escape_control_chars(row))


def _print_diversity(kind: str, diversity: Diversity) -> None:
    if diversity.mean_distance is not None:
        of = f" ({diversity.compared} of them)" if diversity.compared < diversity.total else ""
        print(f"diversity: the mean distance between two {kind} pictures{of} is {diversity.mean_distance:.3f}")


# --- the sheet ------------------------------------------------------------------------------------------------------


def make_copies_sheet(
    report: CopyReport, generated: Mapping[Path, Image.Image], training: Mapping[Path, Image.Image]
) -> Image.Image:
    """The first 96 pairs row by row, the nearest first, copies framed in red."""
    shown = report.matches[:MAX_PAIRS]
    width, height = PAIR[0] + MARGIN, PAIR[1] + LINE + MARGIN
    columns = best_columns(len(shown), width, height)
    top = 2 * MARGIN + TITLE_SIZE
    sheet = Image.new("RGB", (MARGIN + columns * width, top + math.ceil(len(shown) / columns) * height), "white")
    title = f"generated | nearest, {len(shown)} of {len(report.matches)}; copies: within {report.scale.limit:.3f}"
    write_text(ImageDraw.Draw(sheet), TextBox(MARGIN, MARGIN, sheet.width - 2 * MARGIN), title, TITLE_SIZE, "black")
    for index, match in enumerate(shown):
        corner = MARGIN + index % columns * width, top + index // columns * height
        _paste_pair(sheet, corner, match, (generated[match.generated], training[match.training]))
    return sheet


def _paste_pair(
    sheet: Image.Image, corner: tuple[int, int], match: NearestMatch, pair: tuple[Image.Image, Image.Image]
) -> None:
    """Both pictures side by side with their upper left corner at `corner`, framed, with the distance below."""
    left, upper = corner
    for offset, picture in zip((0, CELL[0] + 2), pair, strict=True):
        sheet.paste(ImageOps.pad(picture, CELL, color="white"), (left + offset, upper))
    draw = ImageDraw.Draw(sheet)
    frame, ink = (COPY_COLOUR, COPY_COLOUR) if match.is_copy else ("gainsboro", "black")
    draw.rectangle((left - 2, upper - 2, left + PAIR[0] + 1, upper + PAIR[1] + 1), outline=frame, width=2)
    words = f"{match.distance:.3f}{' copy of' if match.is_copy else ' from'} {match.training_name}"
    write_text(draw, TextBox(left, upper + PAIR[1] + 3, PAIR[0]), words, FONT_SIZE, ink)
