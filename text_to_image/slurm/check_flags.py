"""Refuses a wrong flag of any of the three scripts before the first of them starts.

python check_flags.py COUNT CAPTION_FLAG... COUNT TRAIN_FLAG... COUNT INFERENCE_FLAG...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import img_captioning
import inference
import train_text_to_image
from runtime.errors import exit_with
from runtime.flags import given_flags


def split_counted(words: list[str]) -> list[list[str]]:
    """['2', 'a', 'b', '1', 'c'] -> [['a', 'b'], ['c']]: any word may be a flag's value, so none can separate."""
    groups, start = [], 0
    while start < len(words):
        end = start + 1 + int(words[start])
        groups.append(words[start + 1 : end])
        start = end
    return groups


def main() -> None:
    captioning, training, generation = split_counted(sys.argv[1:])
    sys.argv[0] = "img_captioning.py"  # a message names this as the script whose --help lists the flags
    img_captioning.parse_args(captioning)
    sys.argv[0] = "train_text_to_image.py"
    train_text_to_image.parse_args(training)
    sys.argv[0] = "inference.py"
    # Not its parse_args: that would look into the model, which is not trained yet.
    given_flags(inference.build_parser(), generation)


if __name__ == "__main__":
    exit_with(main)
