"""Which files in a folder are pictures of a data set, and which cannot be read. Standard library only."""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from runtime.errors import UserError

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
METADATA_FILES = (METADATA, METADATA_CSV)  # of two in a folder the first is read
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Formats that are not read: those of phones and cameras, which may lie beside a JPEG made of them, ...
CAMERA_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".rw2"}
)
# ... and others.
OTHER_SUFFIXES = frozenset(
    {".dds", ".eps", ".exr", ".hdr", ".ico", ".j2k", ".jp2", ".jpe", ".jpx", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm"}
    | {".psd", ".qoi", ".svg", ".tga", ".xcf"}
)
CONTAINER_SUFFIXES = TAR, PARQUET = ".tar", ".parquet"  # of files that hold pictures and their captions
TEXT_SUFFIXES = frozenset({".caption", ".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".txt", ".yaml"})
# How pictures begin, whatever they are called: JPEG, PNG, GIF, TIFF, JPEG XL, JPEG 2000, Photoshop.
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS"),
)
FTYP_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
# What our scripts write among pictures and no data set contains: sheets, and pictures that a safety checker blackened.
SHEETS = frozenset({"contact_sheet.jpg", "copies_sheet.jpg"})
WITHHELD_SUFFIX = "-withheld"
WITHHELD = re.compile(rf".*-[0-9a-f]{{8}}-[0-9]+{WITHHELD_SUFFIX}\.(?:png|jpg)")
DIGITS = re.compile("([0-9]+)")
MASK_ENDINGS = (".mask", "-masklabel")  # 1.mask.png, or OneTrainer's 1-masklabel.png: where in 1.jpg the loss counts


def find_image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The pictures in `folder`, '2.jpg' before '10.jpg'; no hidden ones, no masks. UserError where there is none.

    `recursive`: also those in sub-folders, except hidden ones and those with a metadata file of their own.
    """
    return _find_files(folder, recursive, _is_picture)


def find_mask_files(folder: Path, recursive: bool = False) -> list[Path]:
    """The files in `folder` that are masks by their names, whether or not there is a picture beside them; links, too,
    that lead to no file."""
    return _find_files(folder, recursive, _is_mask)


def find_unsupported_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Pictures in formats or under suffixes that are not read, but not a raw file beside the JPEG that was made of it.

    What has no suffix of a picture is told by its first bytes.
    """
    found = _find_files(folder, recursive, _is_unsupported)
    if all(path.suffix.lower() not in CAMERA_SUFFIXES for path in found):
        return found
    readable = {path.with_suffix("") for path in find_image_files(folder, recursive)}
    return [p for p in found if not (p.suffix.lower() in CAMERA_SUFFIXES and p.with_suffix("") in readable)]


def find_nested_image_files(folder: Path) -> list[Path]:
    """The pictures in `folder` and below; only those in `folder` itself where a sub-folder cannot be listed."""
    return _find_nested(find_image_files, folder)


def find_nested_unsupported_files(folder: Path) -> list[Path]:
    """As `find_unsupported_files`, in `folder` and below; only in `folder` where a sub-folder cannot be listed."""
    return _find_nested(find_unsupported_files, folder)


def find_nested_mask_files(folder: Path) -> list[Path]:
    """As `find_mask_files`, in `folder` and below; only in `folder` where a sub-folder cannot be listed."""
    return _find_nested(find_mask_files, folder)


def mask_key(mask: Path) -> str | None:
    """The same as one of `picture_keys` of the picture that the mask belongs to by its name; None of other files."""
    stem = mask.stem
    if not stem.lower().endswith(MASK_ENDINGS):  # asked of every file
        return None
    name = next(stem[: -len(ending)] for ending in MASK_ENDINGS if stem.lower().endswith(ending))
    return _key(mask.parent / name) if name else None


def picture_keys(picture: Path) -> tuple[str, ...]:
    """Of masks that are named after the picture without its suffix, and with it: 1.mask.png, 1.jpg.mask.png."""
    return tuple(dict.fromkeys([_key(picture.with_suffix("")), _key(picture)]))


def _key(path: Path) -> str:
    """The path, whatever the case of the name and whether its letters are composed."""
    return str(path.with_name(unicodedata.normalize("NFC", path.name).casefold()))


def _find_nested(find: Callable[[Path, bool], list[Path]], folder: Path) -> list[Path]:
    try:
        return find(folder, True)
    except OSError:
        return find(folder, False)


def no_pictures_message(folder: Path, recursive: bool = False) -> str:
    """Says that `folder` has no pictures, and what to do about it."""
    message = f"no pictures in {folder}"
    if unsupported := find_unsupported_files(folder, recursive):
        name = unsupported[0].name
        return f"{message} that can be read: {name} is in an unsupported format; save it as JPEG or PNG"
    if masks := find_mask_files(folder, recursive):
        return f"{message}: {masks[0].name} is the mask of one by its name; rename it if it is none"
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
    found = []
    for listed in folders:
        place = [natural_key(part) for part in listed.relative_to(folder).parts]
        found += [([*place, natural_key(path.name)], str(path), path) for path in listed.iterdir() if wanted(path)]
    return [path for *_, path in sorted(found)]


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
    return mask_key(path) is None and _is_image(path)


def _is_mask(path: Path) -> bool:
    if mask_key(path) is None:
        return False
    # A picture that loses its mask would be learned whole.
    return _is_image(path) or path.suffix.lower() in IMAGE_SUFFIXES and path.is_symlink() and not path.exists()


def _is_image(path: Path) -> bool:
    name = path.name
    if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith(".") or not path.is_file():
        return False
    return name not in SHEETS and not WITHHELD.fullmatch(name)


def _is_unsupported(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in TEXT_SUFFIXES or path.name.startswith(".") or not path.is_file():
        return False
    return suffix in CAMERA_SUFFIXES | OTHER_SUFFIXES or _begins_like_a_picture(path)


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    is_bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:12] in FTYP_BRANDS
    return head.startswith(SIGNATURES) or is_bitmap or is_webp or is_heif


def natural_key(name: str) -> list[str | int]:
    """A sort key in which runs of digits count as numbers, numbers come before letters, and case does not matter."""
    parts: list[str | int] = [*DIGITS.split(name.casefold())]  # text, digits, text, ...: '' where it begins with one
    parts[1::2] = map(int, parts[1::2])
    return parts
