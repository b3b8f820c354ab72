"""Captions the pictures of a folder: opened ahead of the model, described in batches, written as they come."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from ahead import work_ahead
from caption_file import CaptionFile, KeptRows, ReplacedRows, remove_litter
from caption_lengths import cut_words, describe_lengths, load_tokenizer
from captioners import Captioner, load_captioner
from data import measure, open_picture, with_trigger
from devices import keep_large_blocks
from errors import WorkError, harmless
from inspecting import tell
from locking import RunLock
from reporting import progress

LONGEST_SIDE = 1536  # pixels: no captioner sees more of a picture, and as many large ones as wait are in memory
TRAINING_READS = 3  # chunks of CLIP's 77 tokens, as --max_token_chunks of training has it
DECIDING = ("model", "prompt", "max_new_tokens", "trigger", "max_words")  # flags that captions follow from

Item = TypeVar("Item")


def caption_folder(args: argparse.Namespace, file: CaptionFile, model: str) -> None:
    """Captions what `file` lacks, or all with --existing replace; then says what the captions and pictures are like.

    Raises UserError where the model cannot be loaded or another run writes into the file, and WorkError that names the
    pictures without a caption once all the others have theirs.
    """
    lock = RunLock(
        file.path.parent, f".{file.path.name}.lock", f"writes captions into {file.path.name}", "name another --output"
    )
    lock.take()
    keep_large_blocks()
    try:
        remove_litter(file)
        tokenizer = load_tokenizer(args.tokenizer)
        captioner = load_captioner(
            model, args.prompt, args.max_new_tokens,
            allow_pickle=args.allow_pickle, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        failures = caption_pending(args, file, captioner, model)
    finally:
        lock.release()
    rows = file.rows()
    if captions := [caption for row in rows for caption in row.captions]:
        lengths = describe_lengths(tokenizer, captions, TRAINING_READS)
        print(f"{lengths} (by the tokenizer of {args.tokenizer})")
    tell(file)
    if failures:
        raise WorkError("\n  ".join([f"{_pictures(len(failures))} without a caption:", *failures]))


def caption_pending(args: argparse.Namespace, file: CaptionFile, captioner: Captioner, model: str) -> list[str]:
    """Captions what is to be done, batch by batch; returns what is wrong with the pictures that got no caption."""
    writer = _writer(args, file, model)
    pending = writer.pending()
    chosen, failures = pending[: args.limit], []
    print(
        f"captioning {len(chosen)} of {_pictures(len(file.pictures()))} in {args.image_dir} with {model}", flush=True
    )
    with progress(total=len(chosen), desc="captioning", unit="picture") as bar, writer:
        for batch in _batches(open_ahead(chosen), args.batch_size):
            named = [(file.name_of(path), image) for path, image in batch]
            failures += [f"{name}: {fault}" for name, fault in named if isinstance(fault, str)]
            images = {name: image for name, image in named if not isinstance(image, str)}
            texts = captioner.describe(list(images.values())) if images else []
            captions = {name: _fit(text, args) for name, text in zip(images, texts, strict=True)}
            failures += [f"{name}: the model found no words for it" for name, text in captions.items() if not text]
            writer.add({name: text for name, text in captions.items() if text})
            bar.update(len(batch))
    if len(chosen) == len(pending) and not failures:
        writer.finish()
    if len(failures) < len(chosen):
        print(f"written to {file.path}: read the captions, and correct what is wrong")
    return failures


def _writer(args: argparse.Namespace, file: CaptionFile, model: str) -> KeptRows:
    if args.existing == "keep":
        return KeptRows(file, _say)
    settings = {**{flag: getattr(args, flag) for flag in DECIDING}, "model": model}
    writer = ReplacedRows(file, _say, settings)
    if writer.goes_on:
        print(f"going on with a replacement that was broken off: {_pictures(len(writer.done))} done already")
    if writer.backup:
        print(f"the captions as they were: {file.path.with_name(writer.backup)}")
    return writer


def _say(captions: Mapping[str, str]) -> None:
    for name, text in captions.items():
        tqdm.write(harmless(f"{name}: {text}"), file=sys.stdout)
    sys.stdout.flush()


def _fit(text: str, args: argparse.Namespace) -> str:
    """The caption as it is written: of at most --max_words, after --trigger; empty where the model found no words."""
    return with_trigger(cut_words(text, args.max_words), args.trigger) if text else ""


def open_ahead(paths: Iterable[Path]) -> Iterator[tuple[Path, Image.Image | str]]:
    """(path, picture) of each path in order, or (path, what is wrong with it); opened ahead of their use."""
    return work_ahead(_open, paths)


def _open(path: Path) -> Image.Image | str:
    """The picture, as large as a captioner can see it."""
    try:
        os.fsencode(path).decode("utf-8")
        measure(path)  # says in words what is wrong with a picture
        picture = open_picture(path, LONGEST_SIDE)
    except UnicodeDecodeError:
        return "its name is not UTF-8, so no row can hold it; rename it"
    except (OSError, ValueError) as error:
        return str(error)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _batches(items: Iterator[Item], size: int) -> Iterator[Sequence[Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"
