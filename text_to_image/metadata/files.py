"""Which metadata files a data set's folder has: its own, those of its sub-folders, and what only looks like one.

As `datasets`' imagefolder finds them: metadata.jsonl or metadata.csv, each for the pictures of its folder and below.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from metadata.image_files import IMAGE_SUFFIXES, METADATA, METADATA_CSV, METADATA_FILES, find_image_files, natural_key
from metadata.rows import shown

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
        where, name = self.folder / self.prefix, self.path.name
        counts = name == METADATA or name == METADATA_CSV and not (where / METADATA).exists()
        return counts and self.path.parent.resolve() == where.resolve()

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
    read = ((here, own_metadata_file(here)) for here, _, is_read in walk_folders(folder, leave_out) if is_read)
    return [MetadataFile(path, folder, _place(here, folder)) for here, path in read if path]


def unread_metadata_files(folder: Path, leave_out: Path | None = None) -> list[str]:
    """What holds captions and is not read: a metadata.csv beside a metadata.jsonl, folders of other splits, and files
    that only look like a metadata file."""
    folder, unread = Path(folder), []
    for here, names, is_read in walk_folders(folder, leave_out):
        present, place = [name for name in METADATA_FILES if name in names], _place(here, folder)
        if is_read:
            passed_over = present[1:] if present else _near_misses(names)
            unread += [(place / name).as_posix() for name in passed_over]
        elif present:
            unread.append(f"{place.as_posix()}/")
    return unread


def walk_folders(folder: Path, leave_out: Path | None) -> Iterator[tuple[Path, list[str], bool]]:
    """The folder and those below it, the names of their files, and whether their captions are of the split that is
    trained on; without hidden folders and `leave_out`. A folder that cannot be listed is empty."""
    left_out = leave_out.resolve() if leave_out else None
    for name, subfolders, names in os.walk(folder):
        here = Path(name)
        subfolders[:] = sorted((sub for sub in subfolders if not sub.startswith((".", "__"))), key=natural_key)
        if left_out and here.resolve() == left_out:
            subfolders.clear()
        else:
            yield here, names, OTHER_SPLITS.isdisjoint(here.relative_to(folder).parts)


def _place(here: Path, folder: Path) -> PurePosixPath:
    return PurePosixPath(here.relative_to(folder).as_posix())


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
    folders = [here for here in (folder, folder / "train") if here.is_dir() and not own_metadata_file(here)]
    near = [here / name for here in folders for name in _near_misses(path.name for path in here.iterdir())]
    if parquet := next((path for path in near if path.name == PARQUET), None):
        return f"{parquet} has the captions; training reads it as it is, and nothing is captioned"
    if not (path := next((path for path in near if path.is_file()), None)):
        return None
    json = re.search("json", path.name, re.IGNORECASE)
    name, content = (METADATA, "a JSON object in each line") if json else (METADATA_CSV, "columns file_name,text")
    return f"{path} is not read; if it holds the captions, rename it to {name} ({content}), else move it away"


def _near_misses(names: Iterable[str]) -> list[str]:
    """Of the files in a folder; captions.txt beside captions.jpg is none."""
    paths = [PurePosixPath(name) for name in names]
    pictures = {path.stem for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
    return sorted(path.name for path in paths if _is_near_miss(path.name) and path.stem not in pictures)


def _is_near_miss(name: str) -> bool:
    return name == PARQUET or bool(NEAR_MISS.fullmatch(name) or OTHER_NAME.fullmatch(name))
