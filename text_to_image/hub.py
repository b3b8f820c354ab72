"""The model hub where it is not a model that is fetched: data sets come from it, finished runs go to it."""

import argparse
import json
import re
from pathlib import Path

from captions import METADATA
from errors import UserError, WorkError, first_line

NOT_UPLOADED = ["checkpoint-*/**", ".partial-*/**", "cache/**", ".cache/**"]


def find_dataset(args: argparse.Namespace) -> Path:
    """The captioned folder: --dataset itself where it is one, else written from a data set of the hub, once.

    Raises UserError where it is neither.
    """
    folder = Path(args.dataset).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.dataset):
        return _folder_of(args, folder)
    return write_folder(args, load_split(args))


def _folder_of(args: argparse.Namespace, folder: Path) -> Path:
    """`folder`, unless it is a data set in a form that only `datasets` reads, such as parquet files."""
    holds_tables = folder.is_dir() and not (folder / METADATA).exists() and any(folder.rglob("*.parquet"))
    return write_folder(args, load_split(args)) if holds_tables else folder


def load_split(args: argparse.Namespace):
    """The training split, as `datasets` has it; pictures stay undecoded."""
    import datasets

    try:
        split = datasets.load_dataset(
            args.dataset, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
        )
    except Exception as error:  # the hub's errors have no common class
        raise UserError(
            f"--dataset {args.dataset}: no captioned folder, and not to be had from the hub: {first_line(error)}"
        ) from None
    for flag, column in (("image_column", args.image_column), ("caption_column", args.caption_column)):
        if column not in split.column_names:
            raise UserError(f"--{flag} {column}: {args.dataset} has {', '.join(split.column_names)}")
    return split.cast_column(args.image_column, datasets.Image(decode=False))


def write_folder(args: argparse.Namespace, split) -> Path:
    """Pictures as they are and metadata.jsonl, in the data sets' cache; the same data set is written once."""
    import datasets

    root = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE)
    name = re.sub(r"[^\w.-]", "_", args.dataset)
    folder = root / "captioned_folders" / f"{name}-{split._fingerprint}"
    if (folder / METADATA).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, row in enumerate(split):
        picture = row[args.image_column]
        content = picture["bytes"] or Path(picture["path"]).read_bytes()
        name = f"{number:06d}{Path(picture['path'] or '').suffix or '.png'}"
        (folder / name).write_bytes(content)
        rows.append(json.dumps({"file_name": name, args.caption_column: row[args.caption_column]}) + "\n")
    part = folder / f".{METADATA}.part"
    part.write_text("".join(rows), encoding="utf-8")
    part.replace(folder / METADATA)  # last, so that a folder with it is whole
    return folder


def upload(args: argparse.Namespace, folder: Path) -> None:
    """The pipeline with run.json and metrics.jsonl; no checkpoint, no cache. WorkError where the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    try:
        repository = api.create_repo(args.hub_model_id or folder.resolve().name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[*NOT_UPLOADED, f"{args.logging_dir}/**"]
        )
    except Exception as error:
        raise WorkError(
            f"--push_to_hub: {first_line(error)}; the result is in {folder}, and the same command tries again"
        ) from None
