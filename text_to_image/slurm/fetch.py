"""Downloads what a job names on the model hub, so that a compute node without internet finds it in the cache.

python fetch.py RECORD CAPTIONER COUNT CAPTION_FLAG... COUNT TRAIN_FLAG...

A captioner is downloaded only where a picture has no caption yet; RECORD is the file that remembers it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import img_captioning
import train_text_to_image
from metadata.writer import Existing
from runtime.errors import exit_with, require_packages
from slurm.check_flags import split_counted


def pictures_without_caption(
    folder: Path, recursive: bool, existing: Existing = "keep", metadata_file: Path | None = None
) -> list[Path]:
    """Those that only a captioner can caption; captions are in `metadata_file`, or in the folder's own.

    UserError where training would not take the folder.
    """
    from captioning.caption_file import locate_caption_file, refuse_outside_links, require_pictures_or_rows
    from metadata.sidecars import Sidecars

    captions = locate_caption_file(folder, metadata_file, recursive)
    require_pictures_or_rows(captions)
    refuse_outside_links(captions)
    print(f"the data set: {len(captions.pictures())} pictures in {folder}")
    sidecars = Sidecars()
    pending = [] if captions.is_csv else captions.pending(existing)
    return [path for path in pending if not sidecars.read(path)]


def fetch(record: Path, captioner: str, captioning: argparse.Namespace, training: argparse.Namespace) -> None:
    """Downloads model, data set and captioner where they are not local folders; UserError where the hub has none."""
    from bases.finding import find_bases
    from metadata.hub_datasets import find_datasets

    print(f"the model: {find_bases(training)[0]}")
    uncaptioned = [
        picture
        for folder in find_datasets(training)
        for picture in pictures_without_caption(
            folder, captioning.recursive, captioning.existing, training.metadata_file
        )
    ]
    if uncaptioned and captioner and not Path(captioner).is_dir():
        from captioning.captioner_loading import download_captioner  # imports torch, which takes seconds

        whole = captioning.allow_pickle or captioning.trust_remote_code
        print(f"the captioner: {download_captioner(captioner, whole)}")
        with record.open("a", encoding="utf-8") as file:
            print(f"captioner {captioner}", file=file)


def main() -> None:
    require_packages()
    record, captioner, *words = sys.argv[1:]
    captioning, training = split_counted(words)
    fetch(Path(record), captioner, img_captioning.parse_args(captioning), train_text_to_image.parse_args(training))


if __name__ == "__main__":
    exit_with(main)
