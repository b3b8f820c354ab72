"""Captions the pictures of a folder that have no caption yet, with a BLIP model."""

import argparse
from pathlib import Path

from captions import METADATA, existing_captions, image_files, uncaptioned
from errors import UserError, exit_with, require_packages
from flags import FlagParser, positive_int

EXAMPLES = """\
  python text_to_image/img_captioning.py --image_dir dataset

  python text_to_image/img_captioning.py --image_dir ~/pictures \\
    --model Salesforce/blip-image-captioning-large

The captions go into metadata.jsonl in the folder. Rows that are there stay as
they are, byte for byte: correct captions by hand, and run this again when there
are new pictures.
"""
HERE = Path(__file__).resolve().parent
DATASET = HERE.parent / "dataset"
STARTER = HERE / "starter" / "captioner"
REAL_MODEL = "Salesforce/blip-image-captioning-large"


def main(args: argparse.Namespace) -> None:
    pictures = image_files(args.image_dir)
    if not pictures:
        raise UserError(f"no pictures in {args.image_dir}")
    pending = uncaptioned(args.image_dir, existing_captions(args.image_dir))
    if not pending:
        print(f"all {len(pictures)} pictures in {args.image_dir} have a caption")
        return
    model = args.model or _starter()

    # Heavy, so after everything that can be refused without it.
    require_packages()
    from captioning import caption_pictures, load_captioner

    captioner = load_captioner(model)
    print(f"captioning {len(pending)} of {len(pictures)} pictures in {args.image_dir} with {model}", flush=True)
    caption_pictures(
        pending, captioner, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, prompt=args.prompt
    )
    print(f"added to {args.image_dir / METADATA}: read the captions, and correct what is wrong")


def _starter() -> str:
    if not STARTER.is_dir():
        raise UserError(
            f"no captioner in {STARTER}; name one, for example --model {REAL_MODEL} "
            f"(for job.sh: CAPTIONER={REAL_MODEL})"
        )
    print(f"captioner: the starter, {STARTER}; a real one is named by --model {REAL_MODEL}")
    return str(STARTER)


def parse_args() -> argparse.Namespace:
    parser = FlagParser("img_captioning.py [--image_dir FOLDER] [--model NAME] [flags]", __doc__, EXAMPLES)
    parser.add_argument(
        "--image_dir",
        type=Path,
        default=DATASET,
        metavar="FOLDER",
        help=f"the pictures; {METADATA} is written beside them (default: the repository's dataset/)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"a BLIP captioner, folder or hub id, such as {REAL_MODEL} (default: the starter)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="how every caption begins, such as 'a photograph of' (default: the model begins by itself)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=60,
        metavar="N",
        help="the longest caption, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=4,
        metavar="N",
        help="pictures captioned at once; more need more memory (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(lambda: main(parse_args()))
