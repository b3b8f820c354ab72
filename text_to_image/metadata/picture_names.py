"""Finds the picture that a row names: NFC and NFD are one name, and a near miss is named. Standard library only."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath

from metadata.image_files import CONTAINER_SUFFIXES, IMAGE_SUFFIXES, find_nested_image_files
from metadata.rows import shown

CLOSE = 0.75  # by difflib; one letter of four in another form
MOST_COMPARED = 200  # names with a missing one
LINK_ADVICE = "copy the picture, or make a hard link to it (`cp -l`)"


def same_name_key(name: str) -> str:
    """Equal for a name that is composed (NFC) and the same name decomposed (NFD), as macOS and its tools write it."""
    return unicodedata.normalize("NFC", name)


def distinct_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The shortest end of each path that no other has: '1.jpg', or 'front/1.jpg' where another folder has a 1.jpg.

    Of a picture in a tar shard or a parquet file it begins with the file: '000.tar/1.jpg'.
    """
    remaining, names = set(paths), dict[Path, str]()
    for length in range(1, max((len(path.parts) for path in remaining), default=0) + 1):
        ends = {path: Path(*path.parts[-max(length, _least_parts(path)) :]).as_posix() for path in remaining}
        times = Counter(ends.values())
        names |= {path: end for path, end in ends.items() if times[end] == 1 or length >= len(path.parts)}
        remaining -= names.keys()
    return names


def _least_parts(path: Path) -> int:
    """How many parts of the path begin with the container that it is in; 1 where it is in none."""
    parts = enumerate(reversed(path.parts[:-1]), start=2)
    return next((number for number, part in parts if part.lower().endswith(CONTAINER_SUFFIXES)), 1)


class MissingPicture(ValueError):
    """A row names a picture that is not there: `probably` it means this file, or `perhaps` that with a like name."""

    def __init__(self, noun: str, name: str, probably: str | None, perhaps: str | None):
        meant = probably or perhaps
        question = f"; is {shown(meant)} meant?" if meant else ""
        super().__init__(f"the {noun} {shown(name)} is missing{question}")
        self.probably = probably


class PictureNames:
    """The pictures of a data set's folder by the names that rows give them; each folder is listed at most once."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._listed: dict[PurePosixPath, dict[str, str]] = {}
        self._plain_files: dict[str, frozenset[str]] = {}

    def find(self, name: str, key: str = "file_name") -> str:
        """The name on disk of the picture, or of the mask, that a row names under `key`.

        Raises ValueError unless it is a file inside the folder that is not empty.
        """
        if self._is_plain_file(name):
            return name
        noun = "picture" if key == "file_name" else key
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"`{key}` must stay inside the folder, found {shown(name)}")
        try:
            on_disk = name if (self.folder / name).is_file() else self._same_name(name) or name
            path = self.folder / on_disk
            inside = path.resolve().is_relative_to(self.folder.resolve())  # a link may lead out of it, too
            size = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a lone surrogate, links in a circle
            raise ValueError(f"`{key}` cannot be a file: {shown(name)}") from None
        if not inside:
            raise ValueError(f"`{key}` is a link out of the folder: {shown(name)}; {LINK_ADVICE}")
        if size is None:
            raise MissingPicture(noun, name, self._similar(name), self._close(name))
        if not size:
            raise ValueError(f"the {noun} {shown(name)} is an empty file")
        return on_disk

    def _is_plain_file(self, name: str) -> bool:
        """Whether it is a file that is not empty, with no link on the way to it from the folder."""
        parent, _, last = name.rpartition("/")
        if name.startswith("/") or last not in self._list_plain_files(parent):
            return False
        try:
            return os.stat(f"{self.folder}/{name}").st_size > 0
        except OSError:
            return False

    def _list_plain_files(self, folder: str) -> frozenset[str]:
        """The names of the files in a sub-folder; none where a link may lead elsewhere, or it cannot be listed."""
        if folder not in self._plain_files:
            inside = not folder or self._is_plain_folder(PurePosixPath(folder))
            try:
                with os.scandir(self.folder / folder) as entries:
                    found = [entry.name for entry in entries if inside and entry.is_file(follow_symlinks=False)]
            except (OSError, ValueError):
                found = []
            self._plain_files[folder] = frozenset(found)
        return self._plain_files[folder]

    def _is_plain_folder(self, folder: PurePosixPath) -> bool:
        above = [self.folder / part for part in (folder, *folder.parents)][:-1]
        return not folder.is_absolute() and ".." not in folder.parts and not any(map(os.path.islink, above))

    def _same_name(self, name: str) -> str | None:
        """The name on disk of a file that differs from `name` only in being composed or not; None without."""
        here = PurePosixPath()
        for part in PurePosixPath(name).parts:
            if (on_disk := self._list(here).get(same_name_key(part))) is None:
                return None
            here /= on_disk
        return here.as_posix()

    def _list(self, folder: PurePosixPath) -> dict[str, str]:
        if folder not in self._listed:
            path = self.folder / folder
            names = [found.name for found in path.iterdir()] if path.is_dir() else []
            self._listed[folder] = {same_name_key(name): name for name in names}
        return self._listed[folder]

    def _similar(self, name: str) -> str | None:
        """The picture whose name differs only in case, accents, blanks, dashes, underscores, suffix or folder."""
        *folders, last = re.split(r"[/\\]", name)

        def likeness(candidate: str) -> tuple[bool, int]:
            path = PurePosixPath(candidate)
            return path.suffix.lower() == PurePosixPath(last).suffix.lower(), len({*path.parts} & {*folders})

        return max(self._by_similarity.get(_similarity_key(last), ()), key=likeness, default=None)

    def _close(self, name: str) -> str | None:
        """A picture whose name is like it, such as one in traditional instead of simplified characters."""
        key = _similarity_key(re.split(r"[/\\]", name)[-1])
        close = get_close_matches(key, self._keys_by_digits.get(_digits(key), ()), n=1, cutoff=CLOSE)
        return self._by_similarity[close[0]][0] if close else None

    @cached_property
    def _keys_by_digits(self) -> dict[str, list[str]]:
        """Names that differ in a number are different names, however close: IMG_0012 and IMG_0013."""
        keys: dict[str, list[str]] = {}
        for key in self._by_similarity:
            keys.setdefault(_digits(key), []).append(key)
        return {digits: same[:MOST_COMPARED] for digits, same in keys.items()}

    @cached_property
    def _by_similarity(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for path in find_nested_image_files(self.folder):
            names.setdefault(_similarity_key(path.name), []).append(path.relative_to(self.folder).as_posix())
        return names


def _similarity_key(name: str) -> str:
    """The name without case, accents, suffixes of pictures and what separates words; '1_1' does not become '11'."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    key = "".join(letters).casefold().strip().replace("%20", " ")
    while PurePosixPath(key).suffix in IMAGE_SUFFIXES:
        key = key[: -len(PurePosixPath(key).suffix)]
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", re.sub(r"[\s_-]+", " ", key))


def _digits(name: str) -> str:
    return " ".join(re.findall(r"[0-9]+", name))
