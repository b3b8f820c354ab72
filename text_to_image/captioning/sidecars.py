"""Captions in text files beside the pictures, `1.txt` for `1.jpg`, as kohya's scripts, OneTrainer and SimpleTuner
have them."""

import os
from pathlib import Path

from captioning.caption_writers import CaptionWriter
from captioning.image_loading import find_fault
from data.dataset import with_trigger
from runtime.errors import UserError
from runtime.prefetching import prefetch
from runtime.progress import progress_bar
from runtime.stopping import StopSignals

SUFFIXES = (".txt", ".caption")


def read_sidecar(picture: Path) -> list[str]:
    """The captions in the text file beside the picture, one a line; empty where there is no file or no text in it.

    UserError names a file that is not UTF-8.
    """
    beside = [path for suffix in SUFFIXES if os.path.isfile(path := picture.with_suffix(suffix))]
    return next(filter(None, map(_read_lines, beside)), [])


def write_sidecar_captions(writer: CaptionWriter, trigger: str | None, stop: StopSignals) -> dict[str, str]:
    """Writes rows for the pending pictures that have a text file, without a captioner.

    Returns, by file name, what is wrong with those of these pictures that cannot be read.
    """
    file = writer.file
    sidecars = {path: captions for path in writer.pending() if (captions := read_sidecar(path))}
    faults = {}
    checked = prefetch(find_fault, sidecars)
    for path, fault in progress_bar(
        checked, total=len(sidecars), desc="text files", unit="picture", disable=not sidecars
    ):
        if fault:
            faults[file.name_of(path)] = fault
            continue
        captions = [with_trigger(caption, trigger) for caption in sidecars[path]]
        writer.add({file.name_of(path): captions if len(captions) > 1 else captions[0]})
        stop.note_saved("after captions of text files were written; the same command goes on")
    writer.write()
    if taken := len(sidecars) - len(faults):
        print(f"pictures with a text file beside them: {taken}; its captions are in {file.path}", flush=True)
    return faults


def _read_lines(path: Path) -> list[str]:
    """The lines that are not blank, with single spaces."""
    try:
        # Only \n ends a line: str.splitlines() would also cut a caption at U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    return [text for line in lines if (text := " ".join(line.split()))]
