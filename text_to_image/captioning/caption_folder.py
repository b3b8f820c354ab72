"""Captions the pictures of a folder: opens them ahead of the model, captions them in batches, writes as it goes."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import CLIPTokenizer

from captioning.audit import print_audit
from captioning.caption_file import CaptionFile, remove_partial_caption_files
from captioning.caption_writers import CaptionWriter, ReplacingCaptionWriter
from captioning.captioner_loading import load_captioner
from captioning.captioners import Captioner
from captioning.image_loading import open_ahead
from captioning.lengths import cut_words, load_caption_tokenizer, print_lengths
from captioning.sidecar_captions import read_sidecars, write_sidecar_captions
from data.caption_variants import without_announcement
from data.dataset import with_trigger
from metadata.writer import Captions
from runtime.devices import keep_freed_memory
from runtime.errors import WorkError, escape_control_chars, first_line
from runtime.locking import LockHeld, RunLock
from runtime.prefetching import PREFETCHED
from runtime.progress import progress_bar
from runtime.stopping import StopSignals

LOCK_RETRY_SECONDS = 1
CAPTION_FLAGS = ("model", "prompt", "max_new_tokens", "trigger", "max_words")  # that decide what a caption says


def caption_folder(args: argparse.Namespace, file: CaptionFile, model: str, stop: StopSignals | None = None) -> None:
    """Captions the pictures that `file` has no row for, and those that --existing names; then checks the data.

    Raises UserError where the model cannot be loaded or, without --wait, another run writes into the file. Raises
    WorkError that names the pictures without a caption, once all the others have theirs.
    """
    stop = stop or StopSignals()
    work = f"writes captions into {file.path.name}"
    lock = RunLock(file.path.parent, f".{file.path.name}.lock", work, file.advice_elsewhere())
    _take_lock(lock, args.wait)
    keep_freed_memory()
    try:
        remove_partial_caption_files(file)
        tokenizer = load_caption_tokenizer(args.tokenizer)
        failures = _write_captions(args, file, model, stop)
    finally:
        lock.release()
    stop.note_saved("while checking the data, after the last caption was written; --check does it again")
    _print_summary(args, file, tokenizer, bool(failures))
    if failures:
        raise WorkError("\n  ".join([f"{_count_pictures(len(failures))} without a caption:", *failures]))


def _take_lock(lock: RunLock, wait: bool) -> None:
    """Takes the lock; with `wait` as soon as no other run holds it."""
    announced = False
    while True:
        try:
            return lock.take()
        except LockHeld as held:
            if not wait:
                raise
            if not announced:
                print(f"waiting for another run: {held.holder}", flush=True)
        announced = True
        time.sleep(LOCK_RETRY_SECONDS)


def _write_captions(args: argparse.Namespace, file: CaptionFile, model: str, stop: StopSignals) -> list[str]:
    """Returns a line for each picture that got no caption."""
    captioner = None
    if args.existing == "replace" and len(read_sidecars(pictures := file.pictures())) < len(pictures):
        captioner = _load_captioner(args, model)  # before the first row is replaced: it may not be there
    with _make_writer(args, file, model, stop) as writer:
        faults = write_sidecar_captions(writer, args.trigger, stop)
    if {file.name_of(path) for path in writer.pending()} <= faults.keys():  # so no captioner is needed
        writer.finish()
        print(file.completion_message() or f"all other pictures in {file.image_dir} have a row", flush=True)
        return _print_faults(faults)
    return caption_pending(args, writer, captioner or _load_captioner(args, model), model, stop)


def _load_captioner(args: argparse.Namespace, model: str) -> Captioner:
    return load_captioner(
        model,
        args.prompt,
        args.max_new_tokens,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
    )


def _print_summary(args: argparse.Namespace, file: CaptionFile, tokenizer: CLIPTokenizer, failed: bool) -> None:
    try:
        print_lengths(tokenizer, args.tokenizer, file.rows())
        print_audit(file)
    except Exception as error:
        if not failed:
            raise
        # It must not hide the pictures that got no caption.
        print(f"the data could not be checked: {first_line(error)}", file=sys.stderr)


def caption_pending(
    args: argparse.Namespace, writer: CaptionWriter, captioner: Captioner, model: str, stop: StopSignals | None = None
) -> list[str]:
    """Captions the pictures that are to be captioned, at most --limit; returns a line for each that got no caption."""
    stop, file = stop or StopSignals(), writer.file
    pending, backups_before = writer.pending(), len(writer.backups)
    limit = min(args.limit or len(pending), len(pending))
    total = _count_pictures(len(file.pictures()))
    print(f"captioning {limit} of {total} in {args.image_dir} with {model}", flush=True)
    failures, tried = _caption_batches(args, writer, captioner, pending, stop)
    if tried == len(pending):
        writer.finish()
    for name in writer.backups[backups_before:]:
        print(f"{file.path} was changed by somebody else meanwhile; their version is kept in {name}")
    if len(failures) < tried:
        print(f"written to {file.path}: read the captions, and correct what is wrong")
    return failures


def _caption_batches(
    args: argparse.Namespace, writer: CaptionWriter, captioner: Captioner, pending: Sequence[Path], stop: StopSignals
) -> tuple[list[str], int]:
    """(a line for each picture that got no caption, how many pictures were tried)."""
    limit = min(args.limit or len(pending), len(pending))
    opened = open_ahead(pending, min(PREFETCHED, limit))
    failures: list[str] = []
    tried = answered = 0
    with progress_bar(total=limit, desc="captioning", unit="picture") as bar, writer:
        # Pictures that cannot be read do not count, or --limit would never get past them.
        while batch := list(islice(opened, min(args.batch_size, limit - answered))):
            answers, faults = caption_batch(captioner, {writer.file.name_of(path): image for path, image in batch})
            captions = {name: caption for name, text in answers.items() if (caption := _finish_caption(text, args))}
            faults |= {name: captioner.no_caption_message for name in answers if name not in captions}
            failures += _print_faults(faults)
            writer.add(captions)
            tried, answered = tried + len(batch), answered + len(answers)
            bar.update(len(answers) if args.limit else len(batch))
            stop.note_saved(f"after {tried - len(failures)} captions; the same command goes on")
    return failures, tried


def caption_batch(
    captioner: Captioner, pictures: Mapping[str, Image.Image | str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(captions, faults), both by file name. Of a picture that could not be opened, `pictures` holds the fault."""
    faults = {name: picture for name, picture in pictures.items() if isinstance(picture, str)}
    images = {name: picture for name, picture in pictures.items() if not isinstance(picture, str)}
    try:
        texts = captioner.caption(list(images.values())) if images else []
    except ValueError as error:
        # The model refuses a picture, as Qwen does if it is 200 times as wide as high. Singly, the others pass.
        if len(images) == 1:
            return {}, faults | dict.fromkeys(images, first_line(error))
        captions: dict[str, str] = {}
        for name, image in images.items():
            caption, fault = caption_batch(captioner, {name: image})
            captions, faults = captions | caption, faults | fault
        return captions, faults
    return dict(zip(images, texts, strict=True)), faults


def _make_writer(args: argparse.Namespace, file: CaptionFile, model: str, stop: StopSignals) -> CaptionWriter:
    if args.existing != "replace":
        return CaptionWriter(file, _print_captions, stop.undisturbed, args.existing)
    settings = {**{flag: getattr(args, flag) for flag in CAPTION_FLAGS}, "model": model}
    writer = ReplacingCaptionWriter(file, _print_captions, stop.undisturbed, settings)
    if writer.resumed:
        print(f"resuming an interrupted replacement: {_count_pictures(len(writer.journal.done))} done already")
    for name in writer.backups:
        print(f"the captions as they were before: {file.path.with_name(name)}")
    return writer


def _finish_caption(text: str, args: argparse.Namespace) -> str:
    """The caption as it is written; empty if the model said nothing.

    'Here is a caption:' is cut off, then what is beyond --max_words; --trigger is put in front.
    """
    return with_trigger(cut_words(without_announcement(text), args.max_words), args.trigger) if text else ""


def _print_captions(captions: Captions) -> None:
    for name, caption in captions.items():
        text = caption if isinstance(caption, str) else " | ".join(caption)
        tqdm.write(escape_control_chars(f"{name}: {text}"), file=sys.stdout)
    sys.stdout.flush()


def _print_faults(faults: Mapping[str, str]) -> list[str]:
    """Returns the lines, too."""
    lines = [f"{name}: {fault}" for name, fault in faults.items()]
    for line in lines:
        tqdm.write(escape_control_chars(line), file=sys.stderr)
    return lines


def _count_pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"
