"""Prints the folder that img_captioning.py is to caption, of those that training reads for a --dataset, and the file
that its captions are in: a NUL after each, the names as the file system has them.

python captioned_folder.py DATASET [METADATA_FILE]

Prints nothing for tar shards, parquet files and a data set of the hub.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metadata.files import own_metadata_file
from metadata.hub_datasets import find_captioned_folder
from metadata.image_files import METADATA
from runtime.errors import exit_with


def main() -> None:
    dataset, *named = map(Path, sys.argv[1:])
    if dataset.is_dir() and (folder := find_captioned_folder(dataset, *named)):
        captions = next(iter(named), None) or own_metadata_file(folder) or folder / METADATA
        sys.stdout.buffer.write(b"".join(os.fsencode(path) + b"\0" for path in (folder, captions)))


if __name__ == "__main__":
    exit_with(main)
