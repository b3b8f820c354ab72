"""Captions in text files beside the pictures, `1.txt` for `1.jpg`, as kohya's scripts, OneTrainer and SimpleTuner
have them."""

from pathlib import Path

from errors import UserError

SUFFIXES = (".txt", ".caption")


def read_sidecar(picture: Path) -> list[str]:
    """The captions in the text file beside the picture, one a line; empty where there is none, or none with words.

    UserError names a file that is not UTF-8.
    """
    path = next((path for suffix in SUFFIXES if (path := picture.with_suffix(suffix)).is_file()), None)
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    return [words for line in lines if (words := " ".join(line.split()))]
