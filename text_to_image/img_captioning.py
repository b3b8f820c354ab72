"""Captions the pictures of a folder that have none yet, and checks the data."""

import argparse
from collections.abc import Sequence

from captioning.caption_file import (
    CaptionFile,
    locate_caption_file,
    refuse_distant_text_files,
    refuse_misspelt_names,
    refuse_other_column,
    refuse_outside_links,
    require_pictures_or_rows,
)
from metadata.image_files import METADATA
from runtime.errors import UserError, escape_control_chars, exit_with, require_packages
from runtime.flags import FlagParser, expanded_path, filled_text, positive_int
from runtime.paths import DATASET, STARTER, STARTER_CAPTIONER
from runtime.stopping import StopSignals

EXAMPLES = """\
  python text_to_image/img_captioning.py --image_dir dataset

  python text_to_image/img_captioning.py --image_dir ~/pictures \\
    --model Salesforce/blip-image-captioning-large

  python text_to_image/img_captioning.py --image_dir ~/pictures \\
    --model Qwen/Qwen3-VL-4B-Instruct --trigger "sks jeans" --max_words 60

  python text_to_image/img_captioning.py --image_dir ~/pictures --check

Captions go into metadata.jsonl in the folder as they are made. Rows that exist
stay as they are, byte for byte: correct captions by hand, and run the command
again when there are new pictures or after it was stopped. Where a picture that
is to be captioned has a text file beside it (1.txt, 1.jpg.txt or 1.caption for
1.jpg), each line of that is a caption, or all of it where blank lines make it
paragraphs; only --trigger is put in front. Captions in a metadata.csv are read
and never changed.

exit codes: 0 done; 1 some pictures could not be captioned (the others are), or
--check found something wrong; 2 a mistake in a flag or a file, named in one
line; 75 stopped by a signal, all captions written: run the command again.
"""
REAL_CAPTIONER = "Salesforce/blip-image-captioning-large"


def caption_or_check(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    file = locate_caption_file(args.image_dir, args.output, args.recursive, args.caption_column)
    require_pictures_or_rows(file)
    if args.check:
        require_packages()
        from captioning.audit import run_audit

        return run_audit(file)
    refuse_outside_links(file)
    # Heavy imports come after all that can be refused without them.
    complete = csv_message(file, args.existing) if file.is_csv else file.completion_message(args.existing)
    if complete:
        print(escape_control_chars(complete), flush=True)
        _print_summary(args, file)
    else:
        refuse_other_column(file)
        refuse_misspelt_names(file)
        refuse_distant_text_files(file, args.existing)
        model = args.model or _starter_captioner()
        require_packages()
        from captioning.caption_folder import caption_folder

        caption_folder(args, file, model, stop)
    if hint := file.training_hint():
        print(escape_control_chars(hint))


def csv_message(file: CaptionFile, existing: str) -> str:
    """How many pictures have a row in the metadata.csv. UserError where --existing asks to change it."""
    if existing != "keep":
        raise UserError(
            f"--existing {existing}: {file.path} is read and never changed; write the captions there, or move it away"
        )
    pictures, without = file.pictures(), file.without_row(file.rows())
    message = (
        f"{len(pictures) - len(without)} of {len(pictures)} pictures have a row in {file.path}, which stays as it is"
    )
    others = f"; add rows by hand for the others, such as {escape_control_chars(without[0].name)}" if without else ""
    return message + others


def _print_summary(args: argparse.Namespace, file: CaptionFile) -> None:
    """The captions' lengths and the data's faults, as at the end of a run that captions."""
    require_packages()
    from captioning.audit import print_audit
    from captioning.lengths import load_caption_tokenizer, print_lengths

    print_lengths(load_caption_tokenizer(args.tokenizer), args.tokenizer, file.rows())
    print_audit(file)


def _starter_captioner() -> str:
    if not STARTER_CAPTIONER.is_dir():
        raise UserError(
            f"no captioner in {STARTER_CAPTIONER}; name one, for example --model {REAL_CAPTIONER} "
            f"(for job.sh: CAPTIONER={REAL_CAPTIONER})"
        )
    print(
        f"captioner: the starter, {STARTER_CAPTIONER}; it knows rendered garments only; for a real one use "
        f"--model {REAL_CAPTIONER}"
    )
    return str(STARTER_CAPTIONER)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = FlagParser("img_captioning.py [--image_dir FOLDER] [--model NAME] [flags]", __doc__, EXAMPLES)
    add_folder_flags(parser.add_argument_group("pictures and captions"))
    add_model_flags(parser.add_argument_group("the captioner"))
    add_training_flags(parser.add_argument_group("captions for training"))
    return parser.parse_args(argv)


# A flag's name and type stand on one line, its help on the next.
# fmt: off
def add_folder_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--image_dir", type=expanded_path, default=DATASET, metavar="FOLDER",
         help="the pictures; large ones are scaled down to a longer side of 1536 pixels for the captioner, to save "
              "memory (default: the repository's dataset/)")
    flag("--recursive", action="store_true",
         help="also the pictures in sub-folders, except hidden ones and those with a metadata file of their own "
              "(default: no)")
    flag("--output", type=expanded_path, metavar="FILE",
         help=f"the file that the captions go into (default: {METADATA} in FOLDER). File names in it are relative to "
              f"FOLDER; in a {METADATA} further up they are relative to its own folder, as `datasets` reads it. "
              "Training reads it with --metadata_file FILE")
    flag("--existing", choices=("keep", "fill", "replace"), default="keep",
         help="rows that exist: 'keep' leaves them alone; 'fill' captions those whose text is empty; 'replace' gives "
              "all pictures a new caption, from the text file beside them where there is one. The rows' other keys "
              f"stay, and so does the file that 'replace' changes, as {METADATA}.backup-N (default: keep)")
    flag("--caption_column", default="text", metavar="NAME",
         help="the key of the captions in the rows, as in training (default: text)")
    flag("--limit", type=positive_int, metavar="N",
         help="caption N pictures in this run, not counting those that cannot be read; run the command again for the "
              "next N (default: all)")
    flag("--wait", action="store_true",
         help="if another run is captioning this folder, wait until it ends and caption what is left (default: that "
              "is an error)")
    flag("--check", action="store_true",
         help="caption nothing, only check the data: for duplicates and near duplicates; for pictures that are "
              "broken, tiny (below 256 pixels), blank, dark, blurred or in a format not read; for equal or empty "
              "captions, rows without a picture, pictures without a row, text files that differ from the row. Exit "
              "code 1 if any is found. Pictures rotated by EXIF, in sub-folders or of several frames are listed but "
              "not wrong. A run that captions ends with the same list, which does not change its exit code")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--model", type=filled_text, metavar="NAME",
         help="a folder or hub id: BLIP, BLIP-2, Florence-2 (florence-community/...) or any chat model with vision, "
              "such as Qwen3-VL, SmolVLM, LLaVA, Gemma (default: the starter captioner, which knows rendered garments "
              "only)")
    flag("--prompt", metavar="TEXT",
         help="BLIP: the start of every caption, such as 'a photograph of' (default: none). Others: the question, "
              "which is not part of the caption (default: one that asks for a training caption)")
    flag("--max_new_tokens", type=positive_int, metavar="N",
         help="the longest caption, in the model's tokens (default: BLIP and BLIP-2 60, chat 200, Florence-2 256)")
    flag("--batch_size", type=positive_int, default=8, metavar="N",
         help="pictures captioned at once; halved where the memory is too small (default: 8)")
    flag("--allow_pickle", action="store_true",
         help="also load weights that are not safetensors; only if you trust their maker (default: no)")
    flag("--trust_remote_code", action="store_true",
         help="run the code that a model brings with it; only if you trust its maker (default: no)")


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--trigger", metavar="PHRASE",
         help="put PHRASE in front of every new caption that does not begin with it: 'PHRASE, caption'; training with "
              "the same --trigger does not add it again (default: none)")
    flag("--max_words", type=positive_int, metavar="N",
         help="cut new captions to at most N words, at the end of a sentence if there is one; the trigger does not "
              "count (default: no limit)")
    flag("--tokenizer", type=filled_text, default=str(STARTER), metavar="MODEL",
         help="the Stable Diffusion model, folder or hub id, whose tokenizer measures the captions at the end "
              "(default: the starter model)")


# fmt: on


def main() -> None:
    args = parse_args()
    with StopSignals("before anything was written; run the same command again") as stop:
        caption_or_check(args, stop)


if __name__ == "__main__":
    exit_with(main)
