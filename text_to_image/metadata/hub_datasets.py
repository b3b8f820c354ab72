"""What --dataset names: folders, tar shards, parquet files; data sets of the hub become captioned folders, once."""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from metadata.containers import find_containers
from metadata.files import own_metadata_file
from metadata.image_files import METADATA
from metadata.repeats import REPEATS
from runtime.errors import UserError
from runtime.files import hash_key
from runtime.hub import asking_hub

if TYPE_CHECKING:
    import datasets


def find_datasets(args: argparse.Namespace) -> list[Path]:
    """`find_dataset` for each --dataset, in their order."""
    return [
        find_dataset(argparse.Namespace(**{**vars(args), "dataset": dataset}))
        for dataset in (args.dataset, *(args.more_datasets or ()))
    ]


def find_dataset(args: argparse.Namespace) -> Path:
    """The captioned folder that --dataset names: itself, its `train/`, or one written from a data set of the hub.

    Tar shards and parquet files stay what they are, so does a pattern of them, and with --metadata_file a folder.
    Raises UserError where they are not usable, and where a name that looks like a hub id cannot be had; a missing
    folder is refused when it is read.
    """
    folder = Path(args.dataset).expanduser()
    # A configuration is one that the data set's own card describes, which `datasets` reads.
    containers = [] if args.dataset_config_name else find_containers(folder)
    if args.metadata_file and (containers or not folder.is_dir()):
        raise UserError(f"--metadata_file needs a folder of pictures, and --dataset {args.dataset} is none")
    if containers:
        return folder
    if folder.is_dir():
        return find_captioned_folder(folder, args.metadata_file) or _write_folder(args, _load_split(args))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", args.dataset)
    return _write_folder(args, _load_split(args)) if is_hub_id else folder


def find_captioned_folder(folder: Path, metadata_file: Path | None = None) -> Path | None:
    """The folder of pictures of a local data set: itself or its `train/`; None where tar shards or parquet files have
    the captions.

    With a `metadata_file` elsewhere always itself.
    """
    if metadata_file:
        return folder
    for captioned in (folder, folder / "train"):
        if own_metadata_file(captioned):
            return captioned
    return None if any(folder.rglob("*.parquet")) or find_containers(folder) else folder


def _load_split(args: argparse.Namespace) -> "datasets.Dataset":
    """The training split, its pictures not decoded."""
    import datasets

    with asking_hub(f"--dataset {args.dataset}: no captioned folder, and not available from the hub"):
        split = datasets.load_dataset(
            args.dataset, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
        )
    for flag, column in (("image_column", args.image_column), ("caption_column", args.caption_column)):
        if column not in split.column_names:
            raise UserError(f"--{flag} {column}: {args.dataset} has {', '.join(split.column_names)}")
    return split.cast_column(args.image_column, datasets.Image(decode=False))


def _write_folder(args: argparse.Namespace, split: "datasets.Dataset") -> Path:
    """The split as image files with their original bytes and metadata.jsonl; what was written before is used again."""
    import datasets

    root = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "captioned_folders"
    columns = hash_key(
        split._fingerprint, args.image_column, args.caption_column, *({REPEATS} & {*split.column_names})
    )
    folder = root / f"{re.sub(r'[^A-Za-z0-9.-]', '_', args.dataset)}-{columns}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root))
    _write_rows(args, split, partial)
    try:
        partial.rename(folder)  # last, so that a folder of this name is complete
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


def _write_rows(args: argparse.Namespace, split: "datasets.Dataset", folder: Path) -> None:
    rows = []
    for number, row in enumerate(split):
        name, content = _image_file(row[args.image_column], number, args)
        (folder / name).write_bytes(content)
        repeats = {REPEATS: row[REPEATS]} if REPEATS in row else {}
        rows.append(json.dumps({"file_name": name, args.caption_column: row[args.caption_column], **repeats}) + "\n")
    (folder / METADATA).write_text("".join(rows), encoding="utf-8")


def _image_file(picture: dict | None, number: int, args: argparse.Namespace) -> tuple[str, bytes]:
    """(file name, content) of the picture in row `number`. UserError where there is none."""
    try:
        picture = picture or {}
        path = picture["path"] or ""
        return f"{number:06d}{Path(path).suffix or '.png'}", picture["bytes"] or Path(path).read_bytes()
    except (TypeError, KeyError, OSError):
        raise UserError(f"{args.dataset}, row {number}: `{args.image_column}` holds no picture") from None
