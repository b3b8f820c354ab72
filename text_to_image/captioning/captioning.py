"""Captions the pictures of a folder: opened ahead of the model, described in batches, written as they come."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from captioning.audit import print_audit
from captioning.caption_file import CaptionFile, KeptRows, ReplacedRows, remove_partial_caption_files
from captioning.captioners import Captioner, load_captioner
from captioning.lengths import cut_words, load_caption_tokenizer, print_lengths
from captioning.sidecars import read_sidecar
from data.dataset import with_trigger
from data.images import open_image, read_image_size
from data.metadata import Captions
from runtime.devices import keep_freed_memory
from runtime.errors import WorkError, escape_control_chars, first_line
from runtime.locking import LockHeld, RunLock
from runtime.prefetching import PREFETCHED, prefetch
from runtime.progress import progress_bar
from runtime.stopping import StopSignals

LONGEST_SIDE = 1536  # pixels: some captioners could see more, but all pictures that wait are in memory at once
ASK_AGAIN = 1  # seconds between looks at whether another run has ended
DECIDING = ("model", "prompt", "max_new_tokens", "trigger", "max_words")  # flags that captions follow from


def caption_folder(args: argparse.Namespace, file: CaptionFile, model: str, stop: StopSignals | None = None) -> None:
    """Captions what `file` lacks, or all with --existing replace; then says what the captions and pictures are like.

    Raises UserError where the model cannot be loaded or, without --wait, another run writes into the file, and
    WorkError that names the pictures without a caption once all the others have theirs.
    """
    stop = stop or StopSignals()
    lock = RunLock(
        file.path.parent, f".{file.path.name}.lock", f"writes captions into {file.path.name}", "name another --output"
    )
    _take(lock, args.wait)
    keep_freed_memory()
    try:
        remove_partial_caption_files(file)
        tokenizer = load_caption_tokenizer(args.tokenizer)
        broken = take_sidecars(file, args.trigger, stop) if args.existing == "keep" else None
        if broken is not None and broken.keys() >= {*map(file.name_of, file.without_row(file.rows()))}:
            print(file.complete() or f"all other pictures in {file.image_dir} have a row", flush=True)
            failures = _say_faults(broken)
        else:
            captioner = load_captioner(
                model, args.prompt, args.max_new_tokens,
                allow_pickle=args.allow_pickle, trust_remote_code=args.trust_remote_code,
            )  # fmt: skip
            failures = caption_pending(args, file, captioner, model, stop)
    finally:
        lock.release()
    stop.note_saved("while looking at the pictures, after the last caption was written; --check looks again")
    try:
        print_lengths(tokenizer, args.tokenizer, file.rows())
        print_audit(file)
    except Exception as error:
        if not failures:
            raise
        print(f"no look at the data: {first_line(error)}", file=sys.stderr)
    if failures:
        raise WorkError("\n  ".join([f"{_pictures(len(failures))} without a caption:", *failures]))


def take_sidecars(file: CaptionFile, trigger: str | None, stop: StopSignals) -> dict[str, str]:
    """Writes the rows of pictures that have captions in a text file beside them; returns what is wrong with those of
    these pictures that cannot be read, by name."""
    with KeptRows(file, _say, stop.undisturbed) as writer:
        beside = {path: captions for path in writer.pending() if (captions := read_sidecar(path))}
        faults = {}
        for path, fault in progress_bar(
            prefetch(_fault_of, beside), total=len(beside), desc="text files", unit="picture", disable=not beside
        ):
            if fault:
                faults[file.name_of(path)] = fault
                continue
            captions = [with_trigger(caption, trigger) for caption in beside[path]]
            writer.add({file.name_of(path): captions if len(captions) > 1 else captions[0]})
            stop.note_saved("after captions of text files were written; the same command goes on")
    if taken := len(beside) - len(faults):
        print(f"{_pictures(taken)} with a text file beside: what it says is in {file.path}", flush=True)
    return faults


def _take(lock: RunLock, wait: bool) -> None:
    """Takes the lock, with `wait` as soon as no other run holds it."""
    told = False
    while True:
        try:
            return lock.take()
        except LockHeld as held:
            if not wait:
                raise
            if not told:
                print(f"waiting for another run: {held.holder}", flush=True)
        told = True
        time.sleep(ASK_AGAIN)


def caption_pending(
    args: argparse.Namespace, file: CaptionFile, captioner: Captioner, model: str, stop: StopSignals | None = None
) -> list[str]:
    """Captions what is to be done, batch by batch; returns what is wrong with the pictures that got no caption."""
    stop = stop or StopSignals()
    writer = _writer(args, file, model, stop)
    pending, copies = writer.pending(), len(writer.backups)
    wanted = min(args.limit or len(pending), len(pending))
    failures: list[str] = []
    tried = described = 0
    print(f"captioning {wanted} of {_pictures(len(file.pictures()))} in {args.image_dir} with {model}", flush=True)
    opened = open_ahead(pending, min(PREFETCHED, wanted))
    with progress_bar(total=wanted, desc="captioning", unit="picture") as bar, writer:
        # Pictures that cannot be read do not count, or --limit would stand still before them.
        while batch := list(islice(opened, min(args.batch_size, wanted - described))):
            texts, faults = describe_batch(captioner, {file.name_of(path): image for path, image in batch})
            captions = {name: _fit(text, args) for name, text in texts.items()}
            faults |= {name: captioner.no_words for name, text in captions.items() if not text}
            failures += _say_faults(faults)
            writer.add({name: text for name, text in captions.items() if text})
            tried, described = tried + len(batch), described + len(texts)
            bar.update(len(texts) if args.limit else len(batch))
            stop.note_saved(f"after {tried - len(failures)} captions; the same command goes on")
    if tried == len(pending):
        writer.finish()
    for name in writer.backups[copies:]:
        print(f"{file.path} was changed by somebody else meanwhile: as it was then, it is {name}")
    if len(failures) < tried:
        print(f"written to {file.path}: read the captions, and correct what is wrong")
    return failures


def describe_batch(
    captioner: Captioner, pictures: Mapping[str, Image.Image | str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(captions, what is wrong with the pictures that have none), by name; a picture may be what is wrong with it."""
    faults = {name: picture for name, picture in pictures.items() if isinstance(picture, str)}
    images = {name: picture for name, picture in pictures.items() if name not in faults}
    try:
        texts = captioner.describe(list(images.values())) if images else []
    except ValueError as error:  # one is refused, as Qwen does one that is 200 times as wide as high: which?
        if len(images) == 1:
            return {}, faults | dict.fromkeys(images, first_line(error))
        captions: dict[str, str] = {}
        for name, image in images.items():
            one, fault = describe_batch(captioner, {name: image})
            captions, faults = captions | one, faults | fault
        return captions, faults
    return dict(zip(images, texts, strict=True)), faults


def _writer(args: argparse.Namespace, file: CaptionFile, model: str, stop: StopSignals) -> KeptRows:
    if args.existing == "keep":
        return KeptRows(file, _say, stop.undisturbed)
    settings = {**{flag: getattr(args, flag) for flag in DECIDING}, "model": model}
    writer = ReplacedRows(file, _say, stop.undisturbed, settings=settings)
    if writer.goes_on:
        print(f"going on with a replacement that was broken off: {_pictures(len(writer.done))} done already")
    for name in writer.backups:
        print(f"the captions as they were: {file.path.with_name(name)}")
    return writer


def _say(captions: Captions) -> None:
    for name, caption in captions.items():
        text = caption if isinstance(caption, str) else " | ".join(caption)
        tqdm.write(escape_control_chars(f"{name}: {text}"), file=sys.stdout)
    sys.stdout.flush()


def _say_faults(faults: Mapping[str, str]) -> list[str]:
    lines = [f"{name}: {fault}" for name, fault in faults.items()]
    for line in lines:
        tqdm.write(escape_control_chars(line), file=sys.stderr)
    return lines


def _fit(text: str, args: argparse.Namespace) -> str:
    """The caption as it is written: of at most --max_words, after --trigger; empty where the model found no words."""
    return with_trigger(cut_words(text, args.max_words), args.trigger) if text else ""


def open_ahead(paths: Iterable[Path], ahead: int = PREFETCHED) -> Iterator[tuple[Path, Image.Image | str]]:
    """(path, picture) of each path in order, or (path, what is wrong with it); opened ahead of their use."""
    return prefetch(_open, paths, ahead)


def _open(path: Path) -> Image.Image | str:
    """The picture, as large as a captioner can see it."""
    if fault := _fault_of(path):
        return fault
    picture = open_image(path, LONGEST_SIDE)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _fault_of(path: Path) -> str | None:
    """What is wrong with a picture, in words."""
    try:
        os.fsencode(path).decode("utf-8")
        read_image_size(path)
    except UnicodeDecodeError:
        return "its name is not UTF-8, so no row can hold it; rename it"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"
