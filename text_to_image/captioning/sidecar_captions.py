"""Captions in text files beside the pictures become rows, without a captioner."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from captioning.caption_writers import CaptionWriter
from captioning.image_loading import find_fault
from data.dataset import with_trigger
from metadata.sidecars import Sidecar, Sidecars
from runtime.errors import escape_control_chars
from runtime.prefetching import prefetch
from runtime.progress import progress_bar
from runtime.stopping import StopSignals


def read_sidecars(pictures: Iterable[Path]) -> dict[Path, Sidecar]:
    """The text files of those pictures that have one with a text in it. UserError names one that is not UTF-8."""
    sidecars = Sidecars()
    return {path: sidecar for path in pictures if (sidecar := sidecars.read(path))}


def write_sidecar_captions(writer: CaptionWriter, trigger: str | None, stop: StopSignals) -> dict[str, str]:
    """Writes rows for the pending pictures that have a text file, without a captioner.

    Returns, by file name, what is wrong with those of these pictures that cannot be read.
    """
    file = writer.file
    sidecars = read_sidecars(writer.pending())
    faults = {}
    checked = prefetch(find_fault, sidecars)
    for path, fault in progress_bar(
        checked, total=len(sidecars), desc="text files", unit="picture", disable=not sidecars
    ):
        if fault:
            faults[file.name_of(path)] = fault
            continue
        captions = [with_trigger(caption, trigger) for caption in sidecars[path].captions]
        writer.add({file.name_of(path): captions if len(captions) > 1 else captions[0]})
        stop.note_saved("after captions of text files were written; the same command goes on")
    writer.write()
    if taken := {path: sidecar for path, sidecar in sidecars.items() if file.name_of(path) not in faults}:
        print(f"pictures with a text file beside them: {len(taken)}; its captions are in {file.path}")
        print(escape_control_chars(f"  understood as {describe_sidecars(taken)}"), flush=True)
    return faults


def describe_sidecars(sidecars: Mapping[Path, Sidecar]) -> str:
    """How many were taken for one caption and for several, with an example of what may be meant otherwise."""
    joined = [sidecar.path.name for sidecar in sidecars.values() if sidecar.joined]
    several = [sidecar.path.name for sidecar in sidecars.values() if len(sidecar.captions) > 1]
    kinds = [
        (len(sidecars) - len(joined) - len(several), "one line, one caption", ()),
        (len(joined), "paragraphs of one caption", joined[:1]),
        (len(several), "several captions, one a line", several[:1]),
    ]
    return ", ".join(
        f"{words}: {number}" + "".join(f" ({name})" for name in names) for number, words, names in kinds if number
    )
