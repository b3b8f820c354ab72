"""The model hub where it is not a model that is fetched: data sets come from it, finished runs go to it."""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from data.metadata import METADATA
from runtime.errors import UserError, hub_error_reason
from runtime.files import hash_key


def find_dataset(args: argparse.Namespace) -> Path:
    """The captioned folder: --dataset itself where it is one, else written from a data set of the hub, once.

    Raises UserError where it is neither.
    """
    folder = Path(args.dataset).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.dataset):
        return _folder_of(args, folder)
    return write_folder(args, load_split(args))


def _folder_of(args: argparse.Namespace, folder: Path) -> Path:
    """`folder`, or its `train/`; but one of parquet files is read by `datasets`."""
    if not folder.is_dir() or (folder / METADATA).exists():
        return folder
    if (folder / "train" / METADATA).exists():
        return folder / "train"
    return write_folder(args, load_split(args)) if any(folder.rglob("*.parquet")) else folder


def load_split(args: argparse.Namespace):
    """The training split, as `datasets` has it; pictures stay undecoded."""
    import datasets

    try:
        split = datasets.load_dataset(
            args.dataset, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
        )
    except Exception as error:  # the hub's errors have no common class
        raise UserError(
            f"--dataset {args.dataset}: no captioned folder, and not to be had from the hub: {hub_error_reason(error)}"
        ) from None
    for flag, column in (("image_column", args.image_column), ("caption_column", args.caption_column)):
        if column not in split.column_names:
            raise UserError(f"--{flag} {column}: {args.dataset} has {', '.join(split.column_names)}")
    return split.cast_column(args.image_column, datasets.Image(decode=False))


def write_folder(args: argparse.Namespace, split) -> Path:
    """Pictures as they are and metadata.jsonl, in the data sets' cache; the same data set is written once."""
    import datasets

    root = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "captioned_folders"
    columns = hash_key(split._fingerprint, args.image_column, args.caption_column)
    folder = root / f"{re.sub(r'[^A-Za-z0-9.-]', '_', args.dataset)}-{columns}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=root))
    rows = []
    for number, row in enumerate(split):
        name, content = _picture_of(row[args.image_column], number, args)
        (part / name).write_bytes(content)
        rows.append(json.dumps({"file_name": name, args.caption_column: row[args.caption_column]}) + "\n")
    (part / METADATA).write_text("".join(rows), encoding="utf-8")
    try:
        part.rename(folder)  # at last, so that a folder of this name is whole
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return folder


def _picture_of(picture: dict | None, number: int, args: argparse.Namespace) -> tuple[str, bytes]:
    """(file name, content) of a row's picture."""
    try:
        path = picture["path"] or ""
        return f"{number:06d}{Path(path).suffix or '.png'}", picture["bytes"] or Path(path).read_bytes()
    except (TypeError, KeyError, OSError):
        raise UserError(f"{args.dataset}, row {number}: `{args.image_column}` holds no picture") from None
