"""Prints the folder that img_captioning.py is to caption, of those that training reads for a --dataset.

python captioned_folder.py DATASET [METADATA_FILE]     prints nothing for a data set of the hub or of parquet files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.hub_datasets import find_captioned_folder
from runtime.errors import exit_with


def main() -> None:
    dataset, *named = map(Path, sys.argv[1:])
    if dataset.is_dir() and (folder := find_captioned_folder(dataset, *named)):
        print(folder)


if __name__ == "__main__":
    exit_with(main)
