"""Tar shards and parquet files that hold pictures and captions: which ones a --dataset names, and what is in them.

A picture in one has the path CONTAINER/MEMBER, such as shards/000.tar/000123.jpg or train.parquet/000123.jpg. It is
read where it lies; nothing is unpacked. Standard library only, but for parquet files.
"""

import errno
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from metadata import parquet_files, tar_shards
from metadata.files import OTHER_SPLITS, own_metadata_file, walk_folders
from metadata.files import PARQUET as METADATA_PARQUET
from metadata.image_files import CONTAINER_SUFFIXES, IMAGE_SUFFIXES, METADATA_FILES, PARQUET, TAR
from runtime.errors import UserError

PACKED = re.compile(r"\.(?:tgz|tbz2?|txz|tar\.\w+|zip|7z|rar)$", re.IGNORECASE)  # what cannot be read in place
WILDCARDS = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # shard-{000..010}.tar, {a,b}.tar
MOST_FILES = 100_000  # that braces may stand for


# --- A picture by its path ------------------------------------------------------------------------------------------


def is_container(path: Path) -> bool:
    """Whether it is a file that may hold pictures, by its name."""
    return path.suffix.lower() in CONTAINER_SUFFIXES and path.is_file()


def container_of(path: Path) -> Path:
    """The file on disk that a picture is in: the path itself for an ordinary file."""
    if not any(suffix in str(path).lower() for suffix in CONTAINER_SUFFIXES):  # asked of every picture
        return path
    return next((here for here in (path, *path.parents) if is_container(here)), path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, or of a member of a container. OSError where it cannot be read."""
    container = container_of(path)
    if container == path:
        return path.read_bytes()
    try:
        if container.suffix.lower() == PARQUET:
            return parquet_files.read_picture(container, path.relative_to(container))
        return tar_shards.read_member(container, path.relative_to(container).as_posix())
    except UserError as error:  # it was another file when the run began
        raise OSError(errno.EIO, str(error), str(path)) from None


def list_pictures(container: Path, image_column: str = parquet_files.IMAGE_COLUMN) -> tuple[list[Path], list[Path]]:
    """The pictures in a container, with a caption or without, and those in formats that are not read.

    UserError where it cannot be read.
    """
    if container.suffix.lower() == PARQUET:
        return [container / name for name in parquet_files.list_pictures(container, image_column)], []
    samples = tar_shards.list_samples(container)
    pictures = [container / sample.picture for sample in samples if sample.picture]
    return pictures, [container / sample.unreadable for sample in samples if sample.unreadable]


def list_masks(container: Path) -> list[Path]:
    """The members of a tar shard that are masks by their names."""
    return [container / name for name in tar_shards.list_masks(container)] if container.suffix.lower() == TAR else []


# --- What --dataset names -------------------------------------------------------------------------------------------


def find_containers(dataset: Path) -> list[Path]:
    """The tar shards and parquet files of a data set, in the order of their names: the file that it is, those in the
    folder, or those that match the pattern. Empty for every other data set. UserError where one is not usable.
    """
    if is_pattern(dataset):
        return [_require_container(path, f"--dataset {dataset}: ") for path in _expand_pattern(dataset)]
    if dataset.is_dir():
        return _in_folder(dataset)
    return [_require_container(dataset)] if dataset.is_file() or _looks_packed(dataset.name) else []


def is_pattern(dataset: Path) -> bool:
    """Whether it stands for several files: shards/*.tar, shards/{000..010}.tar."""
    if not WILDCARDS.search(str(dataset)) and not BRACES.search(str(dataset)):
        return False
    return not os.path.exists(dataset)  # nor is what is too long for a file's name


def base_folder(dataset: Path) -> Path:
    """The folder that names of a data set's pictures are relative to."""
    if is_pattern(dataset):
        plain = [here for here in dataset.parents if not WILDCARDS.search(str(here)) and "{" not in str(here)]
        return plain[0] if plain else Path()
    return dataset.parent if is_container(dataset) else dataset


def title_of(dataset: Path) -> str:
    """A short name for what is made of a data set: 'shards' for shards/*.tar, 'jeans' for jeans.tar."""
    if is_container(dataset):
        return dataset.stem
    return base_folder(dataset).resolve().name


def unread_containers(dataset: Path) -> list[str]:
    """The names of tar shards and parquet files in a data set's folder that are not read."""
    return [path.relative_to(dataset).as_posix() for path in _list_folder(dataset)[1]] if dataset.is_dir() else []


def _in_folder(folder: Path) -> list[Path]:
    read, unread = _list_folder(folder)
    if unread and not read:
        raise UserError(
            f"--dataset {folder}: no tar shard and no parquet file to train on; by its name {unread[0].name} is of "
            "another split: name the files themselves"
        )
    return [_require_container(path) for path in read]


def _list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """(to train on, others) of a folder that holds nothing else, by their names; empty for a folder of pictures.

    Not to train on are other splits, and the table of addresses that img2dataset writes beside each tar shard.
    """
    if own_metadata_file(folder) or own_metadata_file(folder / "train"):
        return [], []
    found: dict[Path, bool] = {}
    for here, names, is_read in walk_folders(folder, None):
        if any(map(_is_loose, names)):
            return [], []
        found |= {here / name: is_read and not _is_of_other_split(name) for name in names if _looks_packed(name)}
    tables = {path for path in found if path.suffix.lower() == PARQUET and path.with_suffix(TAR) in found}
    read = [path for path in sorted(found) if found[path] and path not in tables]
    return read, [path for path in sorted(found) if path not in set(read)]


def _is_loose(name: str) -> bool:
    """Whether the file makes its folder one of pictures or of captions."""
    is_picture = Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    return is_picture or name in (*METADATA_FILES, METADATA_PARQUET)


def _looks_packed(name: str) -> bool:
    return not name.startswith(".") and (Path(name).suffix.lower() in CONTAINER_SUFFIXES or bool(PACKED.search(name)))


def _is_of_other_split(name: str) -> bool:
    return not OTHER_SPLITS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _require_container(path: Path, asked: str = "") -> Path:
    """The path, if it is a tar shard or a parquet file. UserError."""
    if PACKED.search(path.name) and not path.is_dir():
        raise UserError(
            f"{asked}{path}: compressed, and a tar shard is read in place; unpack it and name the folder, or pack it "
            "again without compression: tar -cf NAME.tar FILES"
        )
    if not path.exists():
        raise UserError(f"{asked}{path}: no such file")
    if not is_container(path):
        raise UserError(
            f"{asked}{path}: neither a folder nor a {TAR} or {PARQUET} file; a data set is a folder of pictures, or "
            "tar shards or parquet files"
        )
    return path


def _expand_pattern(pattern: Path) -> list[Path]:
    found = [path for name in _expand_braces(str(pattern)) for path in _matches(name, pattern)]
    if missing := [path for path in found if not path.exists()]:
        raise UserError(
            f"--dataset {pattern}: {len(missing)} of {len(found)} files are not there, the first is {missing[0]}"
        )
    return list(dict.fromkeys(found))


def _matches(name: str, pattern: Path) -> list[Path]:
    if not WILDCARDS.search(name):
        return [Path(name)]
    if not (found := sorted(glob.glob(name, recursive=True))):
        raise UserError(f"--dataset {pattern}: no file matches {name}")
    return [Path(path) for path in found]


def _expand_braces(text: str) -> Iterator[str]:
    """What a shell makes of {000..010} and {a,b}. UserError for too many."""
    if not (match := BRACES.search(text)):
        yield text
        return
    first, last, words = match.groups()
    for word in words.split(",") if words else _number_words(first, last, text):
        yield from _expand_braces(text[: match.start()] + word + text[match.end() :])


def _number_words(first: str, last: str, text: str) -> Iterator[str]:
    """'000', '001', ... as wide as the wider of the two."""
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= MOST_FILES:
        raise UserError(f"--dataset {text}: {{{first}..{last}}} stands for more than {MOST_FILES:,} files")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
