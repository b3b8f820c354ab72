"""What the page of a run is told of its plan: the pictures as they are trained, settings, commands, warnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_CARDS, MOST_HELD_OUT_CARDS = 48, 12  # pictures with a thumbnail; the others are listed
MOST_LISTED, LISTED_CAPTION = 3000, 160  # of the others; and how many characters of their captions


@dataclass(frozen=True)
class DataPicture:
    """A picture of the data set."""

    name: str
    path: Path
    size: tuple[int, int]  # (height, width) in pixels that it is trained at
    captions: Sequence[str]  # the whole one first, then its shorter variants
    held_out: bool = False
    notes: Sequence[str] = ()  # in words: its mask, repeats, whether it is mirrored


@dataclass(frozen=True)
class RunFacts:
    """All that the page shows and that no file in the output folder says."""

    command: str  # that goes on where the run has stopped
    uses: Sequence[tuple[str, str]]  # (what for, command) of the result
    warnings: Sequence[str]
    settings: Sequence[tuple[str, str, str]]  # (name, value, where it comes from) of those that are not the defaults
    summary: Sequence[tuple[str, str]]  # as it was printed
    pictures: Sequence[DataPicture]  # with a thumbnail each
    others: Sequence[DataPicture]  # listed; of very many only the first
    counts: tuple[int, int]  # trained on, held out
    buckets: Sequence[tuple[str, int, str]]  # (size, pictures, what to know of it)
    caption_tokens: Sequence[int]
    token_marks: dict[int, str]  # lengths at which something happens, in words
    samples_per_step: int

    @property
    def without_card(self) -> int:
        """How many pictures have no thumbnail."""
        return sum(self.counts) - len(self.pictures)


def split_pictures(trained: Sequence, held_out: Sequence) -> tuple[list, list]:
    """(those with a thumbnail, those that are listed, at most MOST_LISTED)"""
    room = MOST_CARDS + MOST_HELD_OUT_CARDS - min(len(held_out), MOST_HELD_OUT_CARDS)
    shown = [*trained[:room], *held_out[:MOST_HELD_OUT_CARDS]]
    return shown, [*trained[room : room + MOST_LISTED], *held_out[MOST_HELD_OUT_CARDS:]][:MOST_LISTED]
