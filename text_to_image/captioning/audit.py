"""Checks a folder of pictures and captions for what would spoil a training: the findings of --check."""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning.caption_file import CaptionFile
from captioning.image_facts import (
    BLANK,
    BLURRED,
    DARK,
    HASH_BITS,
    TINY,
    ImageFacts,
    find_near_duplicates,
    measure_image,
)
from data.masks import Mask, find_masks, open_mask
from metadata.files import unread_metadata_files
from metadata.reading import ScannedRow
from metadata.sidecars import find_differing_sidecars, find_distant_sidecars
from runtime.errors import UserError, WorkError, escape_control_chars
from runtime.prefetching import prefetch
from runtime.progress import progress_bar

MOST_MEASURED = 10_000  # pictures; of more only a part is opened, at equal distances
SHOWN_FINDINGS = 10  # of each kind, after a run that captions


@dataclass(frozen=True)
class Finding:
    """A fault of one picture or row; with `wrong` False only something worth knowing."""

    kind: str
    text: str
    wrong: bool = True


def missing_packages() -> str | None:
    """How to install the packages that measure pictures; None where they are there."""
    packages = {"imagehash": "ImageHash", "skimage": "scikit-image"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    return f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}" if missing else None


def run_audit(file: CaptionFile) -> None:
    """Prints all findings. Raises WorkError where something is wrong."""
    if packages := missing_packages():
        raise UserError(f"--check: {packages}")
    findings = find_faults(file)
    print_findings(findings)
    if wrong := sum(finding.wrong for finding in findings):
        things = "1 thing is" if wrong == 1 else f"{wrong} things are"
        raise WorkError(f"{things} wrong with the data in {file.image_dir}; see the list above")


def print_audit(file: CaptionFile) -> None:
    """Prints the first findings of each kind, and never fails because of them."""
    if packages := missing_packages():
        print(f"the data was not checked: {packages}")
    else:
        print_findings(find_faults(file), SHOWN_FINDINGS)


def print_findings(findings: Sequence[Finding], limit: int | None = None) -> None:
    """By kind, at most `limit` of each."""
    wrong = any(finding.wrong for finding in findings)
    print("checked the data:" if wrong else "checked the data: nothing is wrong")
    for kind in dict.fromkeys(finding.kind for finding in findings):
        texts = [finding.text for finding in findings if finding.kind == kind]
        shown = texts[:limit]
        more = [f"... and {len(texts) - len(shown)} more; --check lists all"] if len(shown) < len(texts) else []
        print(escape_control_chars("\n    ".join([f"  {kind}: {len(texts)}", *shown, *more])), flush=True)


def find_faults(file: CaptionFile) -> list[Finding]:
    """All findings, kind by kind, pictures in order."""
    rows = file.rows()
    paths = _pictures_to_measure(file, rows)
    sample = list(paths)[:: math.ceil(len(paths) / MOST_MEASURED) or 1]
    measured = prefetch(lambda name: measure_image(paths[name], name), sample)
    bar = progress_bar(measured, total=len(sample), desc="checking the pictures", unit="picture")
    images = [facts for _, facts in bar]
    in_files = [*audit_files(file, rows), *audit_caption_files(file, rows), *audit_sample(len(sample), len(paths))]
    masks = audit_masks(file, rows, [facts for facts in images if facts.fault is None])
    return [*in_files, *masks, *audit_images(images), *audit_rows(rows, paths)]


def _pictures_to_measure(file: CaptionFile, rows: Sequence[ScannedRow]) -> dict[str, Path]:
    """name → path: the pictures in the folder, and what else a row names: training reads that, too."""
    pictures = {file.name_of(path): path for path in file.pictures()}
    named = (PurePosixPath(row.file_name).as_posix() for row in rows if not row.picture_fault)
    return pictures | {name: file.root / name for name in named}


def audit_sample(measured: int, pictures: int) -> Iterator[Finding]:
    """That not all pictures were looked at, where there are very many."""
    if measured < pictures:
        kind = "a sample of the pictures (a note: all rows are checked, and training names every broken picture)"
        yield Finding(kind, f"{measured:,} of {pictures:,} were opened and compared", wrong=False)


def audit_files(file: CaptionFile, rows: Sequence[ScannedRow]) -> Iterator[Finding]:
    """Files that are neither captioned nor trained on."""
    for path in file.without_row(rows, among=file.unsupported_files()):
        kind = "in a format that cannot be read (or under a suffix that is not; save them as .jpg or .png)"
        yield Finding(kind, file.name_of(path))
    for path in file.without_row(rows, among=file.nested_pictures()):
        kind = "in sub-folders, without a row (--recursive captions them)"
        yield Finding(kind, file.name_of(path), wrong=False)


def audit_caption_files(file: CaptionFile, rows: Sequence[ScannedRow]) -> Iterator[Finding]:
    """Captions that are not read, or that contradict a row."""
    for name in unread_metadata_files(file.root) if file.is_of_data_set else ():
        kind = "with captions that are not read (beside a metadata.jsonl, almost of its name, or of other splits)"
        yield Finding(kind, name, wrong=not name.endswith("/"))
    captions = [(file.root / row.file_name, row.captions) for row in rows if not row.picture_fault]
    for path in find_differing_sidecars(captions):
        kind = "text files that differ from the row of their picture (--existing replace takes them, or mend the row)"
        yield Finding(kind, path.relative_to(file.root).as_posix())
    for path in find_distant_sidecars(file.image_dir, file.without_row(rows)):
        kind = "text files with the name of a picture, in another folder than it (move them beside it)"
        yield Finding(kind, path.relative_to(file.image_dir).as_posix())
    for path in file.without_row(rows, among=file.pictures_of_other_files()):
        kind = "in sub-folders with a metadata file, without a row in it (caption that sub-folder)"
        yield Finding(kind, file.name_of(path))


def audit_masks(file: CaptionFile, rows: Sequence[ScannedRow], images: Iterable[ImageFacts]) -> Iterator[Finding]:
    """Masks that training would refuse, whatever it crops the pictures to."""
    sizes = {file.root / image.name: (image.width, image.height) for image in images}
    named = {file.root / row.file_name: file.root / row.mask for row in rows if row.mask}
    masks, faults = find_masks(file.image_dir, sizes, named)
    faults += [f"{row.where}: {row.mask_fault}" for row in rows if row.mask_fault]
    for picture, path in masks.items():
        try:
            if picture in sizes:  # it was opened
                open_mask(Mask(path), sizes[picture])
        except ValueError as fault:
            faults.append(f"{path}: {fault}")
    yield from (Finding("masks that cannot be used", fault) for fault in faults)


def audit_images(images: Sequence[ImageFacts]) -> Iterator[Finding]:
    readable = [image for image in images if image.fault is None]
    yield from (Finding("broken", f"{image.name}: {image.fault}") for image in images if image.fault)
    for image in readable:
        if min(image.width, image.height) < TINY:
            yield Finding(f"tiny (shorter side below {TINY} pixels)", f"{image.name}: {image.width} x {image.height}")
    yield from find_blank(readable)
    for image in readable:
        if image.blur > BLURRED and image.contrast >= BLANK:
            yield Finding(f"blurred (above {BLURRED} on a scale from 0 to 1)", f"{image.name}: {image.blur:.2f}")
    yield from find_duplicates(readable)
    for image in readable:
        if image.animated:
            yield Finding("of several frames or pages (a note: only the first is read)", image.name, wrong=False)
    for image in readable:
        if image.rotated_by_exif:
            yield Finding("rotated by EXIF (a note: training rotates them, too)", image.name, wrong=False)


def find_blank(images: Iterable[ImageFacts]) -> Iterator[Finding]:
    """Pictures with nothing to see in them, or hardly anything."""
    for image in images:
        if image.contrast < BLANK:
            note = ": the empty first frame of an animation; save another frame as PNG" if image.animated else ""
            yield Finding("blank (one colour all over)", f"{image.name}{note}")
        elif image.brightest <= DARK:
            kind = "nearly black (greys of 10 to 14 bits saved as 16 look so; stretch them to 16 bits)"
            yield Finding(kind, f"{image.name}: at most {image.brightest} of 255")


def find_duplicates(images: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Pictures that equal an earlier one pixel by pixel, then those that nearly do."""
    first: dict[bytes, ImageFacts] = {}
    for image in images:
        if (same := first.setdefault(image.pixel_hash, image)) is not image:
            yield Finding("the same picture twice", f"{image.name} = {same.name}")
    for image, similar, distance in find_near_duplicates(list(first.values())):
        text = f"{image.name} ~ {similar.name} ({distance} of {HASH_BITS} bits differ)"
        yield Finding("nearly the same picture twice", text)


def audit_rows(rows: Sequence[ScannedRow], picture_names: Iterable[str]) -> Iterator[Finding]:
    """Faults of rows, and the pictures that have no row."""
    for row in rows:
        if row.picture_fault:
            yield Finding("rows without a picture", f"{row.where}: {row.picture_fault}")
    for row in rows:
        if row.caption_fault:
            yield Finding("rows without a caption", f"{row.where}: {row.caption_fault}")
    for row in rows:
        if row.repeats_fault:
            yield Finding("rows with wrong repeats", f"{row.where}: {row.repeats_fault}")
    yield from find_equal_captions(rows)
    named = {PurePosixPath(row.file_name) for row in rows}
    for name in picture_names:
        if PurePosixPath(name) not in named:
            yield Finding("pictures without a row", name)


def find_equal_captions(rows: Iterable[ScannedRow]) -> Iterator[Finding]:
    """Captions that several rows have, whatever their case and spaces."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        for caption in dict.fromkeys(" ".join(caption.casefold().split()) for caption in row.captions):
            lines.setdefault(caption, []).append(str(row.line) if row.is_own else row.where)
    for caption, numbers in lines.items():
        if len(numbers) > 1:
            shown = caption if len(caption) <= 60 else caption[:57] + "..."
            listed = ", ".join(numbers[:10]) + (", ..." if len(numbers) > 10 else "")
            yield Finding("equal captions", f"lines {listed}: {shown}")
