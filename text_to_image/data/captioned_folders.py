"""The folders of a data set, read as one: their pictures in order, and what to know of what was found beside them."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from data.dataset import Columns, Picture, read_pictures, with_masks
from data.file_facts import FileFacts
from metadata.containers import base_folder, find_containers, list_pictures, unread_containers
from metadata.files import find_metadata_files, pictures_without_row
from metadata.image_files import find_nested_image_files, find_nested_unsupported_files
from metadata.reading import CaptionSources, describe_captions
from runtime.errors import UserError
from runtime.processes import run_on_main


@dataclass(frozen=True)
class DataSet:
    """The pictures of one or several folders. Names are relative to a single folder; of several they begin with it."""

    folders: list[Path]
    pictures: list[Picture]
    without_caption: list[str]  # names of pictures in a folder, and below, that have no row
    unreadable: list[str]  # the same of pictures in a format or under a suffix that is not read
    caption_sources: CaptionSources


def read_dataset(
    args: argparse.Namespace, accelerator: Accelerator, folders: Sequence[Path], facts: FileFacts | None = None
) -> DataSet:
    """With `facts` of earlier starts pictures that have not changed since are not read.

    Raises UserError where a folder is not usable, and where two of them have one picture.
    """
    parts = [_read_folder(args, accelerator, folder, facts) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    refuse_shared_pictures(parts)
    parts = [_with_full_names(part) for part in parts]
    sources = [vars(part.caption_sources) for part in parts]
    return DataSet(
        folders=list(folders),
        pictures=[picture for part in parts for picture in part.pictures],
        without_caption=[name for part in parts for name in part.without_caption],
        unreadable=[name for part in parts for name in part.unreadable],
        caption_sources=CaptionSources(**{kind: [n for of in sources for n in of[kind]] for kind in sources[0]}),
    )


def _read_folder(args: argparse.Namespace, accelerator: Accelerator, folder: Path, facts: FileFacts | None) -> DataSet:
    files = find_metadata_files(folder, leave_out=args.validation_dir, named=args.metadata_file)
    columns = Columns(args.caption_column, args.image_column)
    pictures = read_pictures(folder, bool(args.short_captions), columns, args.trigger, files, facts)
    pictures = with_masks(folder, pictures, args.mask_from_alpha)
    if containers := find_containers(folder):
        return _packed(args, folder, containers, pictures)
    captions = [(picture.path, picture.row_captions) for picture in pictures]
    sources = run_on_main(
        accelerator, lambda: describe_captions(folder, files, captions, leave_out=args.validation_dir)
    )
    known = {file.path for picture in pictures for file in (picture, picture.mask) if file}
    without_row = [path for path in find_nested_image_files(folder) if path not in known]
    without_row += pictures_without_row(files, known)
    unsupported = [path for path in find_nested_unsupported_files(folder) if path not in known]
    without_caption, unreadable = (
        [str(path.relative_to(folder)) for path in paths] for paths in (without_row, unsupported)
    )
    return DataSet([folder], pictures, without_caption, unreadable, sources)


def _packed(args: argparse.Namespace, folder: Path, containers: Sequence[Path], pictures: list[Picture]) -> DataSet:
    """The data set of tar shards and parquet files; names begin with that of the shard."""
    known = {picture.path for picture in pictures}
    listed = [list_pictures(container, args.image_column) for container in containers]
    without_caption = [path for pictures, _ in listed for path in pictures if path not in known]
    unreadable = [path for _, unreadable in listed for path in unreadable]
    base = base_folder(folder)
    return DataSet(
        [folder],
        pictures,
        without_caption=[str(path.relative_to(base)) for path in without_caption],
        unreadable=[str(path.relative_to(base)) for path in unreadable],
        caption_sources=CaptionSources(not_read=unread_containers(folder)),
    )


def _with_full_names(part: DataSet) -> DataSet:
    def full(names: Iterable[str]) -> list[str]:
        return [str(base_folder(part.folders[0]) / name) for name in names]

    sources = CaptionSources(**{kind: full(names) for kind, names in vars(part.caption_sources).items()})
    return replace(
        part,
        without_caption=full(part.without_caption),
        unreadable=full(part.unreadable),
        caption_sources=sources,
    )


def refuse_shared_pictures(parts: Sequence[DataSet]) -> None:
    """UserError where a picture is in two folders: one within the other, or one named twice."""
    first: dict[Path, DataSet] = {}
    for part, picture in [(each, picture) for each in parts for picture in each.pictures]:
        if (other := first.setdefault(picture.path.resolve(), part)) is not part:
            raise UserError(
                f"--dataset {picture.folder}: {picture.path} is in --dataset {other.folders[0]} already; leave one of "
                "the two out (`repeats` in a row says how often its picture is used)"
            )


def folder_shares(pictures: Sequence[Picture]) -> dict[Path, tuple[int, float]]:
    """{folder: (its pictures, their share of the samples)}"""
    repeats: dict[Path, list[float]] = {}
    for picture in pictures:
        repeats.setdefault(picture.folder, []).append(picture.repeats)
    total = sum(picture.repeats for picture in pictures)
    return {folder: (len(numbers), sum(numbers) / total) for folder, numbers in repeats.items()}
