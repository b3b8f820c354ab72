"""Which files in a folder are pictures of a data set, and which cannot be read. Standard library only."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from runtime.errors import UserError

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
METADATA_FILES = (METADATA, METADATA_CSV)  # of two in a folder the first is read
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Formats of phones and cameras that Pillow does not read without a plug-in.
UNSUPPORTED_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".rw2"}
)
# What our scripts write among pictures and no data set contains: sheets, and pictures that a safety checker blackened.
SHEETS = frozenset({"contact_sheet.jpg", "copies_sheet.jpg"})
WITHHELD_SUFFIX = "-withheld"


def find_image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The pictures in `folder`, '2.jpg' before '10.jpg', without hidden files. UserError where there is no folder.

    `recursive`: also those in sub-folders, except hidden ones and those with a metadata file of their own.
    """
    return _find_files(folder, recursive, _is_picture)


def find_unsupported_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Pictures in formats that cannot be read, but not a raw file beside the JPEG that was made of it."""
    readable = {path.with_suffix("") for path in find_image_files(folder, recursive)}
    return [path for path in _find_files(folder, recursive, _is_unsupported) if path.with_suffix("") not in readable]


def find_nested_image_files(folder: Path) -> list[Path]:
    """The pictures in `folder` and below; only those in `folder` itself where a sub-folder cannot be listed."""
    try:
        return find_image_files(folder, recursive=True)
    except OSError:
        return find_image_files(folder)


def no_pictures_message(folder: Path, recursive: bool = False) -> str:
    """Says that `folder` has no pictures, and what to do about it."""
    message = f"no pictures in {folder}"
    if unsupported := find_unsupported_files(folder, recursive):
        name = unsupported[0].name
        return f"{message} that can be read: {name} is in an unsupported format; save it as JPEG or PNG"
    if not recursive and find_nested_image_files(folder):
        return f"{message} itself; img_captioning.py --recursive captions those in its sub-folders, too"
    captioned = (path for path in folder.iterdir() if path.is_dir() and _has_metadata(path))
    if captioned_folder := next(captioned, None):
        return f"{message} itself; {captioned_folder} has pictures with captions: name that folder"
    return f"{message} or below it" if recursive else message


def _find_files(folder: Path, recursive: bool, wanted: Callable[[Path], bool]) -> list[Path]:
    folder = Path(folder)
    _require_folder(folder)
    folders = _list_folders(folder) if recursive else [folder]
    found = [path for listed in folders for path in listed.iterdir() if wanted(path)]
    return sorted(found, key=lambda path: ([natural_key(part) for part in path.relative_to(folder).parts], str(path)))


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"no data set folder {folder}; name a folder that holds pictures and {METADATA}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder that holds the pictures and {METADATA}")


def _list_folders(folder: Path) -> list[Path]:
    """`folder` and all below it, except hidden ones, links, and those with a metadata file of their own."""
    folders = []
    for name, subfolders, _ in os.walk(folder, onerror=_raise):
        belongs = Path(name) == folder or not _has_metadata(Path(name))
        folders += [Path(name)] if belongs else []
        # os.walk goes on into what is left in this list.
        subfolders[:] = [subfolder for subfolder in subfolders if belongs and not subfolder.startswith(".")]
    return folders


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).exists() for name in METADATA_FILES)


def _raise(error: OSError) -> None:
    raise error


def _is_picture(path: Path) -> bool:
    if path.name in SHEETS or path.stem.endswith(WITHHELD_SUFFIX):
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_unsupported(path: Path) -> bool:
    return path.suffix.lower() in UNSUPPORTED_SUFFIXES and not path.name.startswith(".") and path.is_file()


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """A sort key in which runs of digits count as numbers, numbers come before letters, and case does not matter."""
    runs = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(False, int(run), "") if run.isdecimal() else (True, 0, run) for run in runs]
