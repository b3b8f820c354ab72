"""Which metadata files a data set's folder has: its own, those of its sub-folders, and what only looks like one.

As `datasets`' imagefolder finds them: metadata.jsonl or metadata.csv, each for the pictures of its folder and below.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.image_files import IMAGE_SUFFIXES, METADATA, METADATA_CSV, METADATA_FILES, find_image_files, natural_key
from data.metadata_rows import shown

PARQUET = "metadata.parquet"
# Metadata.jsonl, metadata.json, metadata.jsonl.txt, meta_data.csv, 'metadata (1).jsonl'.
NEAR_MISS = re.compile(
    r"meta[ _-]?data ?(?:\(\d+\)|[ _-]copy)? ?\.(?:jsonl?|ndjson|jsonlines|csv|tsv)(?:\.(?:txt|jsonl?|csv))?",
    re.IGNORECASE,
)
# Names that other tools give to a file of captions.
OTHER_NAME = re.compile(r"(?:captions?|annotations?|descriptions?)\.(?:jsonl?|ndjson|csv|tsv|txt)", re.IGNORECASE)
# Sub-folders that `datasets` takes for other splits than the one that is trained on.
OTHER_SPLITS = frozenset({"dev", "eval", "evaluation", "test", "testing", "val", "valid", "validation"})


@dataclass(frozen=True)
class MetadataFile:
    """A file with captions of the data set in `folder`; it may lie anywhere."""

    path: Path
    folder: Path
    prefix: PurePosixPath = PurePosixPath()  # from `folder` to a sub-folder that the names are relative to
    names_begin: PurePosixPath = PurePosixPath()  # instead, from a folder further up to `folder`

    @property
    def is_of_folder(self) -> bool:
        """Whether training reads the file without being told to."""
        where = self.folder / self.prefix
        return self.path.name in METADATA_FILES and self.path.parent.resolve() == where.resolve()

    def where(self, line: int) -> str:
        """'metadata.jsonl, line 3', with the sub-folder."""
        return f"{(self.prefix / self.path.name).as_posix()}, line {line}"

    def full_name(self, name: str) -> str:
        """The picture that a row names, from `folder`. Raises ValueError for one that is not in `folder`."""
        if self.names_begin.parts:
            if not PurePosixPath(name).is_relative_to(self.names_begin):
                raise ValueError(
                    f"{shown(name)} is not in {self.folder}, whose names in this file begin with "
                    f"{shown(f'{self.names_begin}/')}; for all of its rows name --dataset {self.path.parent}"
                )
            name = PurePosixPath(name).relative_to(self.names_begin).as_posix()
        return (self.prefix / name).as_posix() if self.prefix.parts else name


def named_metadata_file(path: Path, folder: Path) -> MetadataFile:
    """The file that --metadata_file or --output names, with captions of the pictures in `folder`.

    Its names are relative to `folder`; in a metadata.jsonl or metadata.csv further up to its own folder, as `datasets`
    reads them.
    """
    below, above = folder.resolve(), path.parent.resolve()
    is_above = path.name in METADATA_FILES and below.is_relative_to(above)
    begin = PurePosixPath(below.relative_to(above).as_posix()) if is_above else PurePosixPath()
    return MetadataFile(path, folder, names_begin=begin)


def own_metadata_file(folder: Path) -> Path | None:
    """The metadata file in `folder` itself, of two the metadata.jsonl; None without."""
    return next((path for name in METADATA_FILES if (path := Path(folder) / name).exists()), None)


def find_metadata_files(folder: Path, leave_out: Path | None = None, named: Path | None = None) -> list[MetadataFile]:
    """The folder's own file, then those of its sub-folders, as imagefolder reads them; or only the file `named`.

    Without hidden sub-folders, those of other splits ('validation') and the folder `leave_out`.
    """
    folder = Path(folder)
    if named:
        return [named_metadata_file(named, folder)]
    left_out = leave_out.resolve() if leave_out else None
    files = []
    for name, subfolders, _ in os.walk(folder):  # a folder that cannot be listed has no file
        here = Path(name)
        subfolders[:] = sorted((sub for sub in subfolders if not sub.startswith((".", "__"))), key=natural_key)
        if left_out and here.resolve() == left_out or here.name in OTHER_SPLITS and here != folder:
            subfolders.clear()
        elif path := own_metadata_file(here):
            files.append(MetadataFile(path, folder, PurePosixPath(here.relative_to(folder).as_posix())))
    return files


def unread_metadata_files(folder: Path) -> list[str]:
    """The metadata.csv beside a metadata.jsonl, and the folders of other splits that have captions."""
    folder = Path(folder)
    unread = [METADATA_CSV] if all((folder / name).exists() for name in METADATA_FILES) else []
    splits = (path for path in folder.iterdir() if path.name in OTHER_SPLITS and own_metadata_file(path))
    return unread + sorted(f"{path.name}/" for path in splits)


def pictures_without_row(files: Sequence[MetadataFile], known: Iterable[Path]) -> list[Path]:
    """The pictures beside the metadata files of sub-folders that are not among `known`."""
    known = set(known)
    folders = [file.folder / file.prefix for file in files if file.prefix.parts]
    return [path for folder in folders for path in find_image_files(folder) if path not in known]


def near_miss_message(folder: Path) -> str | None:
    """Names a file that is probably meant as the metadata file of the folder or its `train/`; None where none is, or
    where the folder has the right one."""
    if own_metadata_file(folder):
        return None
    files = [path for here in (folder, folder / "train") if here.is_dir() for path in sorted(here.iterdir())]
    if parquet := next((path for path in files if path.name == PARQUET), None):
        return f"{parquet} has the captions; training reads it as it is, and nothing is captioned"
    if not (near := next((path for path in files if _is_near_miss(path)), None)):
        return None
    json = re.search("json", near.name, re.IGNORECASE)
    name, content = (METADATA, "a JSON object in each line") if json else (METADATA_CSV, "columns file_name,text")
    return f"{near} is not read; if it holds the captions, rename it to {name} ({content}), else move it away"


def _is_near_miss(path: Path) -> bool:
    """Not of captions.txt beside captions.jpg, which it belongs to."""
    is_named_so = NEAR_MISS.fullmatch(path.name) or (
        OTHER_NAME.fullmatch(path.name) and not any(path.with_suffix(suffix).exists() for suffix in IMAGE_SUFFIXES)
    )
    return bool(is_named_so) and path.is_file()
