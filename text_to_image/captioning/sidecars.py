"""Captions in text files beside the pictures, `1.txt` for `1.jpg`, as kohya's scripts, OneTrainer and SimpleTuner
have them."""

import os
from pathlib import Path

from runtime.errors import UserError

SUFFIXES = (".txt", ".caption")


def read_sidecar(picture: Path) -> list[str]:
    """The captions in the text file beside the picture, one a line; empty where there is none, or none with words.

    UserError names a file that is not UTF-8.
    """
    beside = [path for suffix in SUFFIXES if os.path.isfile(path := picture.with_suffix(suffix))]
    return next(filter(None, map(_lines_with_words, beside)), [])


def _lines_with_words(path: Path) -> list[str]:
    try:
        # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    return [words for line in lines if (words := " ".join(line.split()))]
