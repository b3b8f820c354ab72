"""Refuses a wrong flag of any of the three scripts, and a folder that none can write to, before the first starts.

python check_flags.py COUNT CAPTION_FLAG... COUNT TRAIN_FLAG... COUNT INFERENCE_FLAG...
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import img_captioning
import inference
import train_text_to_image
from runtime.errors import UserError, exit_with
from runtime.flags import given_flags
from runtime.paths import GENERATED, OUTPUTS, can_write


def split_counted(words: list[str]) -> list[list[str]]:
    """['2', 'a', 'b', '1', 'c'] -> [['a', 'b'], ['c']]: any word may be a flag's value, so none can separate."""
    groups, start = [], 0
    while start < len(words):
        end = start + 1 + int(words[start])
        groups.append(words[start + 1 : end])
        start = end
    return groups


def check_folders(training: argparse.Namespace, generation: dict[str, Any]) -> None:
    """UserError where a folder of results could not be made: now, not after hours of training."""
    folders = {
        "OUTPUT_DIR": training.output_dir or OUTPUTS,
        "PICTURES_DIR": generation.get("output_dir", GENERATED),
    }
    for variable, folder in folders.items():
        if not can_write(folder):
            raise UserError(f"{folder}: cannot be made or written to; {variable}=FOLDER names another place")


def main() -> None:
    captioning, train_words, generation = split_counted(sys.argv[1:])
    sys.argv[0] = "img_captioning.py"  # a message names this as the script whose --help lists the flags
    img_captioning.parse_args(captioning)
    sys.argv[0] = "train_text_to_image.py"
    training = train_text_to_image.parse_args(train_words)
    sys.argv[0] = "inference.py"
    # Not its parse_args: that would look into the model, which is not trained yet.
    check_folders(training, given_flags(inference.build_parser(), generation))


if __name__ == "__main__":
    exit_with(main)
