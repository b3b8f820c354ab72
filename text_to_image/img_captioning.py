"""Captions the pictures of a folder that have none yet, and looks at them all."""

import argparse
from collections.abc import Sequence

from captioning.caption_file import caption_file, refuse_links, refuse_nothing
from data.metadata import METADATA
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import FlagParser, expanded_path, positive_int
from runtime.paths import DATASET, STARTER, STARTER_CAPTIONER
from runtime.stopping import StopSignals

EXAMPLES = """\
  python text_to_image/img_captioning.py --image_dir dataset

  python text_to_image/img_captioning.py --image_dir ~/pictures \\
    --model Salesforce/blip-image-captioning-large

  python text_to_image/img_captioning.py --image_dir ~/pictures \\
    --model Qwen/Qwen3-VL-4B-Instruct --trigger "sks jeans" --max_words 60

  python text_to_image/img_captioning.py --image_dir ~/pictures --check

The captions go into metadata.jsonl in the folder, as they are made. Rows that
are there stay as they are, byte for byte: correct captions by hand, and run
this again when there are new pictures, or to go on after it was stopped. Where
a text file lies beside a picture without a row (1.txt for 1.jpg), its lines are
the captions, as they stand but for the trigger.

exit codes: 0 done; 1 some pictures could not be captioned (the others are), or
--check found something wrong; 2 a mistake in a flag or a file, named in a line;
75 stopped by a signal, with all captions written: the same command goes on.
"""
REAL_MODEL = "Salesforce/blip-image-captioning-large"


def main(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    file = caption_file(args.image_dir, args.output, args.recursive)
    refuse_nothing(file)
    if not args.check:
        refuse_links(file)
    finished = file.complete() if args.existing == "keep" else None
    model = None if args.check or finished else args.model or _starter()
    if finished and not args.check:
        print(finished, flush=True)

    # Heavy, so after everything that can be refused without it.
    require_packages()
    if model:
        from captioning.captioning import caption_folder

        caption_folder(args, file, model, stop)
    elif args.check:
        from captioning.audit import run_audit

        run_audit(file)
    else:
        from captioning.audit import print_audit
        from captioning.lengths import load_caption_tokenizer, print_lengths

        print_lengths(load_caption_tokenizer(args.tokenizer), args.tokenizer, file.rows())
        print_audit(file)


def _starter() -> str:
    if not STARTER_CAPTIONER.is_dir():
        raise UserError(
            f"no captioner in {STARTER_CAPTIONER}; name one, for example --model {REAL_MODEL} "
            f"(for job.sh: CAPTIONER={REAL_MODEL})"
        )
    print(
        f"captioner: the starter, {STARTER_CAPTIONER}; it knows rendered garments only, and a real one is named by "
        f"--model {REAL_MODEL}"
    )
    return str(STARTER_CAPTIONER)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser("img_captioning.py [--image_dir FOLDER] [--model NAME] [flags]", __doc__, EXAMPLES)
    add_folder_flags(parser.add_argument_group("pictures and captions"))
    add_model_flags(parser.add_argument_group("the captioner"))
    add_training_flags(parser.add_argument_group("captions fit for training"))
    return parser.parse_args(argv)


# A flag's name and type stand on one line, its help on the next.
# fmt: off
def add_folder_flags(group) -> None:
    flag = group.add_argument
    flag("--image_dir", type=expanded_path, default=DATASET, metavar="FOLDER",
         help="the pictures; the captioner is shown large ones at 1536 pixels, the longer side, to save memory "
              "(default: the repository's dataset/)")
    flag("--recursive", action="store_true",
         help="those in sub-folders too, but not in hidden ones or ones that have a metadata.jsonl (default: no)")
    flag("--output", type=expanded_path, metavar="FILE",
         help=f"where the captions go (default: {METADATA} in FOLDER). Names in it are relative to FOLDER; in a "
              f"{METADATA} further up, to where that is, as `datasets` reads it")
    flag("--existing", choices=("keep", "replace"), default="keep",
         help="rows that are there: 'keep' leaves them alone; 'replace' has the captioner write all anew, in place; "
              f"the rows' other keys stay, and the old file as {METADATA}.backup-N (default: keep)")
    flag("--limit", type=positive_int, metavar="N",
         help="caption N pictures in this run, not counting those that cannot be read; the same command goes on with "
              "the next (default: all)")
    flag("--wait", action="store_true",
         help="where another run captions this folder, wait until it has ended and do what it has left (default: it "
              "is an error)")
    flag("--check", action="store_true",
         help="only look, caption nothing: for pictures that are there twice or nearly, broken, tiny (below 256 "
              "pixels), blurred, of a kind that cannot be read; for equal or empty captions, rows without a picture, "
              "pictures without a row. Exit code 1 where one is found. Pictures turned by EXIF or in sub-folders are "
              "listed, but right. A run that captions ends with the same list, whatever its exit code")


def add_model_flags(group) -> None:
    flag = group.add_argument
    flag("--model", metavar="NAME",
         help="a folder or hub id: BLIP, BLIP-2, Florence-2 (florence-community/...) or any chat model with vision, "
              "such as Qwen3-VL, SmolVLM, LLaVA, Gemma (default: the starter, which knows rendered garments only)")
    flag("--prompt", metavar="TEXT",
         help="BLIP: how every caption begins, such as 'a photograph of' (default: by itself). Others: what they are "
              "asked, never in the caption (default: for a caption to train on)")
    flag("--max_new_tokens", type=positive_int, metavar="N",
         help="the longest caption, in the model's tokens (default: BLIP and BLIP-2 60, chat 200, Florence-2 256)")
    flag("--batch_size", type=positive_int, default=8, metavar="N",
         help="pictures captioned at once; fewer where a GPU's memory is too small for so many (default: 8)")
    flag("--allow_pickle", action="store_true",
         help="read weights that are no safetensors; only where you trust their maker (default: no)")
    flag("--trust_remote_code", action="store_true",
         help="run the code that a model brings with it; only where you trust its maker (default: no)")


def add_training_flags(group) -> None:
    flag = group.add_argument
    flag("--trigger", metavar="PHRASE",
         help="put before every new caption: 'PHRASE, caption'; not twice, and not again by training (default: none)")
    flag("--max_words", type=positive_int, metavar="N",
         help="cut new captions within N words, at a sentence's end where there is one; the trigger does not count "
              "(default: whole captions)")
    flag("--tokenizer", default=str(STARTER), metavar="MODEL",
         help="the Stable Diffusion model, folder or hub id, whose tokenizer counts the captions at the end (default: "
              "the starter)")


# fmt: on


def run() -> None:
    args = parse_args()
    with StopSignals("before anything was written; the same command begins again") as stop:
        main(args, stop)


if __name__ == "__main__":
    exit_with(run)
