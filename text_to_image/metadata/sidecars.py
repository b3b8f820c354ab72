"""Captions in text files beside the pictures, `1.txt` for `1.jpg`, as kohya's scripts, OneTrainer and SimpleTuner
have them. Standard library only."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metadata.image_files import find_nested_image_files
from metadata.picture_names import same_name_key
from runtime.errors import UserError
from runtime.text_files import read_utf8

SUFFIXES = (".txt", ".caption")
BOXES = re.compile(r"(?:\d+(?: +\d*\.\d+){4,}\s*)+")  # class, then its place as fractions of the picture


@dataclass(frozen=True)
class Sidecar:
    """The captions of a text file, and what it was taken for."""

    path: Path
    captions: tuple[str, ...]
    joined: bool  # paragraphs that became one caption


class Sidecars:
    """Finds the text files of pictures, whatever the case of their names; each folder is listed at most once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def read(self, picture: Path) -> Sidecar | None:
        """What the text file of the picture says; None where there is no file or no text in it.

        Of several the first with a text counts: `1.jpg.txt`, `1.txt`, `1.jpg.caption`, `1.caption`. UserError names a
        file that is not UTF-8.
        """
        return next(filter(None, map(_read, self.files(picture))), None)

    def files(self, picture: Path) -> list[Path]:
        """The text files that belong to the picture."""
        if not self._list(picture.parent):
            return []
        return [path for name in _names_for(picture) if (path := self._find(picture.parent, name))]

    def _find(self, folder: Path, name: str) -> Path | None:
        names = self._list(folder).get(_key(name), [])
        found = name if name in names else next(iter(names), None)
        return folder / found if found and (folder / found).is_file() else None

    def _list(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if name.lower().endswith(SUFFIXES):
                    names.setdefault(_key(name), []).append(name)
            self._listed[folder] = names
        return self._listed[folder]


def distant_sidecars_message(folder: Path, pictures: Iterable[Path]) -> str | None:
    """Says that text files which seem to be of the pictures lie elsewhere in `folder`; None where none do."""
    if not (found := find_distant_sidecars(folder, pictures)):
        return None
    number = "1 text file" if len(found) == 1 else f"{len(found)} text files"
    return (
        f"{number} with the name of a picture, in another folder than it, such as {found[0]}: if they hold the "
        f"captions, move them beside the pictures, else out of {folder}"
    )


def find_distant_sidecars(folder: Path, pictures: Iterable[Path]) -> list[Path]:
    """The text files in `folder` and below that have the name of one of the pictures, and lie beside no such picture.

    Only for pictures that have no text file beside them.
    """
    sidecars = Sidecars()
    names = {_key(name) for picture in pictures if not sidecars.files(picture) for name in _names_for(picture)}
    listed = (path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and _key(path.name) in names)
    belonging = {path for picture in find_nested_image_files(folder) for path in sidecars.files(picture)}
    return sorted(path for path in listed if path not in belonging and _is_caption(path))


def _is_caption(path: Path) -> bool:
    try:
        return _read(path) is not None
    except UserError:
        return False


def find_differing_sidecars(rows: Iterable[tuple[Path, Sequence[str]]]) -> list[Path]:
    """The text files that say something else than the row of their picture; `rows` are (picture, captions).

    A trigger that stands before most captions, and was put there when they became rows, makes no difference. Files
    that cannot be read are among them: they say something else, and a row is there to be trained on.
    """
    sidecars, unreadable, pairs = Sidecars(), [], []
    for picture, row in rows:
        try:
            pairs += [(sidecar, row)] if row and (sidecar := sidecars.read(picture)) else []
        except UserError:
            unreadable += sidecars.files(picture)[:1]
    trigger = _common_trigger([(sidecar.captions[0], row[0]) for sidecar, row in pairs])
    return unreadable + [
        sidecar.path
        for sidecar, row in pairs
        if _text(row) not in (_text(sidecar.captions), _text([f"{trigger}, {text}" for text in sidecar.captions]))
    ]


def _common_trigger(pairs: Sequence[tuple[str, str]]) -> str | None:
    """What stands before the text and ', ' in most of the (text, row) pairs."""
    ends = [(row, f", {text}") for text, row in pairs]
    triggers = Counter(row.removesuffix(end) for row, end in ends if row.endswith(end))
    trigger, number = max(triggers.items(), key=lambda item: item[1], default=(None, 0))
    return trigger if number * 2 > len(pairs) else None


def _text(captions: Sequence[str]) -> str:
    """All of the captions in one, whatever their spaces: how they are divided makes no difference."""
    return " ".join(" ".join(captions).split())


def _names_for(picture: Path) -> list[str]:
    return [f"{stem}{suffix}" for suffix in SUFFIXES for stem in (picture.name, picture.stem)]


def _key(name: str) -> str:
    return same_name_key(name).casefold()


def _read(path: Path) -> Sidecar | None:
    try:
        captions, joined = parse_captions(read_utf8(path))
    except ValueError as fault:
        raise UserError(f"{path}: {fault}") from None
    return Sidecar(path, captions, joined) if captions else None


def parse_captions(text: str) -> tuple[tuple[str, ...], bool]:
    """(captions, whether paragraphs became one): each line is a caption, or all of it where blank lines divide it.

    Raises ValueError for what is no caption.
    """
    # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
    text = text.replace("\r\n", "\n").strip()
    if BOXES.fullmatch(text):
        raise ValueError("boxes of an object detector (YOLO's labels), and no caption; move it away")
    joined = re.search(r"\n[^\S\n]*\n", text) is not None
    lines = [text] if joined else text.split("\n")
    return tuple(caption for line in lines if (caption := " ".join(line.split()))), joined
