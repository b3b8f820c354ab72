"""Tells whether generated pictures are copies of the training pictures: for
each one the nearest training picture, and how near that is.
"""

import argparse
from collections.abc import Sequence

from runtime.errors import exit_with, require_packages
from runtime.flags import FlagParser, expanded_path
from runtime.paths import DATASET, GENERATED

EXAMPLES = """\
  python text_to_image/check_copies.py

  python text_to_image/check_copies.py --generated Generated_sample \\
    --dataset ~/pictures --embedder facebook/dinov2-base

A copy is what lies about as near to a training picture as copies of known
making do (softened, mirrored, moved by 3 %, recoloured, resized by 5 %, turned
by a degree).

What the structural measure tells: whether the same outlines and creases are in
the same places. A recoloured copy is a copy to it. What it does not tell: a
copy that is turned by more than a degree or bent, and parts that are copied
(a pocket, a logo, a face) in a picture that is new as a whole. What it flags
is worth a look at the sheet, and so are the nearest it does not flag.
An --embedder sees likeness of another kind: things that look alike lie near
each other, copied or not.
"""


def build_parser() -> FlagParser:
    parser = FlagParser("check_copies.py [--generated FOLDER] [--dataset FOLDER] [flags]", __doc__, EXAMPLES)
    parser.add_argument(
        "--generated", type=expanded_path, default=GENERATED, metavar="FOLDER",
        help="pictures that inference.py drew: those that images.jsonl there lists of the model that drew last, else "
        "all but the sheets (default: Generated_sample/ of this repository)",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", type=expanded_path, default=DATASET, metavar="FOLDER",
        help="the pictures that were trained on (default: the repository's dataset/)",
    )  # fmt: skip
    parser.add_argument(
        "--embedder", metavar="MODEL",
        help="compare by the features of a vision model with safetensors, a folder or a hub id, such as "
        "facebook/dinov2-base (default: by structural similarity at 64 px, without a model)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=expanded_path, metavar="FILE.jpg",
        help="the sheet 'generated | nearest' (default: copies_sheet.jpg beside the generated pictures)",
    )  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def main() -> None:
    args = parse_args()
    require_packages()
    from evaluation.copies import check_copies

    check_copies(args)


if __name__ == "__main__":
    exit_with(main)
