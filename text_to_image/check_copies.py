"""Finds generated pictures that are copies of training pictures: prints the
nearest training picture of each one, and its distance.
"""

import argparse
from collections.abc import Sequence

from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import FlagParser, expanded_path, filled_text
from runtime.paths import DATASET, GENERATED

EXAMPLES = """\
  python text_to_image/check_copies.py

  python text_to_image/check_copies.py --generated Generated_sample \\
    --dataset ~/pictures --embedder facebook/dinov2-base

How near is a copy? The script makes copies of the training pictures (blurred,
mirrored, moved by 3 %, recoloured, resized by 5 %, rotated by a degree). A
generated picture about as near to its original as these counts as a copy.

Structural similarity asks whether the same outlines and creases are in the same
places, so a recoloured copy is found. It does not find a copy that is rotated
by more than a degree or bent, nor a copied part (a pocket, a logo, a face) in a
picture that is otherwise new. So look at the sheet: at the copies, and at the
nearest pictures that do not count as copies.

With --embedder, pictures that look alike are near each other, copied or not.
"""


def build_parser() -> FlagParser:
    parser = FlagParser("check_copies.py [--generated FOLDER] [--dataset FOLDER] [flags]", __doc__, EXAMPLES)
    parser.add_argument(
        "--generated", type=expanded_path, default=GENERATED, metavar="FOLDER",
        help="the pictures to check. If inference.py left an images.jsonl there, only those of its newest model; else "
        "all except sheets (default: Generated_sample/ of this repository)",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", action="append", type=expanded_path, metavar="FOLDER",
        help="the training pictures: a folder, tar shards or parquet files; repeatable, as in training (default: "
        "dataset/ of this repository)",
    )  # fmt: skip
    parser.add_argument(
        "--image_column", default="image", metavar="NAME",
        help="the pictures' column in parquet files, as in training (default: image)",
    )  # fmt: skip
    parser.add_argument(
        "--metadata_file", type=expanded_path, metavar="FILE",
        help="the file whose rows name the training pictures, as in training (default: the files in --dataset and its "
        "sub-folders; without rows all pictures in --dataset)",
    )  # fmt: skip
    parser.add_argument(
        "--embedder", type=filled_text, metavar="MODEL",
        help="compare features of this vision model, a folder or a hub id with safetensors, such as "
        "facebook/dinov2-base (default: structural similarity at 64 px, which needs no model)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=expanded_path, metavar="FILE.jpg",
        help="the sheet of pairs 'generated | nearest' (default: copies_sheet.jpg in the --generated folder)",
    )  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.dataset = args.dataset or [DATASET]
    if args.metadata_file and len(args.dataset) > 1:
        raise UserError(
            f"--metadata_file {args.metadata_file} is for one --dataset, and there are {len(args.dataset)}"
        )
    return args


def main() -> None:
    args = parse_args()
    require_packages()
    from evaluation.copies import check_copies

    check_copies(args)


if __name__ == "__main__":
    exit_with(main)
